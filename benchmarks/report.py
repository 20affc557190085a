"""Where figures were taken, how they are kept, and the tables of README made from them.

python benchmarks/report.py FILE.json                     # prints its tables as Markdown
python benchmarks/report.py FOLDER --out FILE.json        # first joins the JSON files of a folder
python benchmarks/report.py FILE.json --readme README.md  # puts them where BEGIN and END are there
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ORIGIN = ("date", "hardware", "versions")
BEGIN, END = "<!-- benchmarks/report.py -->", "<!-- end -->"


def hardware(device: str) -> str:
    """Name and driver of the GPU ("gpu"), or name and cores of the CPU."""
    if device == "gpu":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def origin(device: str, *packages: str) -> dict:
    """Date, hardware and versions: the head of every file of figures."""
    found = (
        datetime.now(UTC).isoformat(timespec="seconds"),
        hardware(device),
        {name: importlib.metadata.version(name) for name in packages},
    )
    return dict(zip(ORIGIN, found, strict=True))


def write_json(path: Path, figures: dict) -> None:
    """Replaces the file at once, so that whoever stops the process leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def collect(folder: Path) -> dict:
    """One tree of the files NAME.json of a folder, under the origin of the first that has one."""
    head, parts = {}, {}
    for file in sorted(folder.glob("*.json")):
        part = json.loads(file.read_text(encoding="utf-8"))
        head = {name: part[name] for name in ORIGIN if name in part} | head
        parts[file.stem] = {name: value for name, value in part.items() if name not in ORIGIN}
    return head | parts


def checks_table(checks: dict) -> str:
    """What benchmarks/gpu.sh found of its parts -> a Markdown table."""
    lines = ["| part | | s |", "|---|---|---|"]
    for name, check in checks.items():
        status = {0: "passed", 124: "out of time"}.get(check["status"], "failed")
        lines.append(f"| {name} | {status} | {check['seconds']} |")
    return "\n".join(lines)


def step_table(step: dict) -> str:
    """What benchmarks/step.py wrote -> a Markdown table, a row for each setting."""
    lines = [
        "| training step | samples in rows | remat | ms | samples/s | TFLOP/s | of peak | GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in step["rows"]:
        begin = f"| {row['task']} | {row['samples']} in {row['rows']} | {row['remat']} "
        gigabytes = f"{row['needed_bytes'] / 1e9:.1f}"
        if row["seconds"] is None:
            lines.append(f"{begin}| does not fit | | | | {gigabytes} |")
            continue
        rate = row["flops"] / row["seconds"]
        lines.append(
            f"{begin}| {1000 * row['seconds']:.0f} | {row['samples'] / row['seconds']:.1f} "
            f"| {rate / 1e12:.3g} | {rate / step['peak']:.0%} | {gigabytes} |"
        )
    return "\n".join(lines)


def _three(value: float) -> str:
    """With three digits, or as many as an integer has."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def sampling_table(sampling: dict) -> str:
    """What benchmarks/sampling.py wrote -> a Markdown table, PyTorch beside ours."""
    lines = ["| sampling | ms | times ours | of the matmul peak |", "|---|---|---|---|"]
    for title, (ours, *others) in sampling["tables"].items():
        reading = title.startswith("Token")  # All weights, for one row of products.
        peak = f"{ours['peak_share']:.0%}"
        if reading:
            peak = f"weights at {_three(sampling['decode_weights_gb_per_s'])} GB/s"
        lines.append(f"| **{title}: jflow** | {_three(1000 * ours['seconds'])} | 1 | {peak} |")
        for row in others:
            peak = "" if reading else f"{row['peak_share']:.0%}"
            lines.append(
                f"| {row['name']} | {_three(1000 * row['seconds'])} | {row['ratio']:.2f} | {peak} |"
            )
    for batch, latency in sampling["image_latency_s"].items():
        lines.append(f"| an image in a batch of {batch} | {1000 * latency['image']:.0f} | | |")
    return "\n".join(lines)


def tables(figures: dict) -> str:
    """All tables of a file that step.py, sampling.py or gpu.sh wrote, and where they are from."""
    found = []
    if "hardware" in figures:
        versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
        found.append(f"{figures['hardware']}; {versions}; {figures['date'][:10]}")
    if "checks" in figures:
        found.append(checks_table(figures["checks"]))
    for part in (figures, *(value for value in figures.values() if isinstance(value, dict))):
        if "rows" in part:
            found.append(step_table(part))
        if "tables" in part:
            found.append(sampling_table(part))
    return "\n\n".join(found)


def put_tables(readme: Path, file: Path) -> None:
    """Replaces what stands between BEGIN and END in a Markdown file by the tables of FILE.json.

    Raises SystemExit where it has no such place.
    """
    text = readme.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise SystemExit(f"{readme} has no lines {BEGIN} and {END}.")
    shown = tables(json.loads(file.read_text(encoding="utf-8")))
    readme.write_text(f"{before}{BEGIN}\n{shown}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="a JSON file, or with --out a folder of them")
    parser.add_argument("--out", type=Path, help="where to join the folder's files")
    parser.add_argument("--readme", type=Path, help="a Markdown file that shows the tables")
    args = parser.parse_args()
    if args.out:
        write_json(args.out, collect(args.path))
    if args.readme:
        put_tables(args.readme, args.out or args.path)
    print(tables(json.loads((args.out or args.path).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
