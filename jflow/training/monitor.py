"""Where a run reports to: metrics.jsonl, TensorBoard, Weights & Biases; and a profiler's trace."""

import html
import io
import json
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Log:
    """RUN/metrics.jsonl, one object a line; RUN/tensorboard; and a project of Weights & Biases.
    RUN/train.json has the config as it was resolved.

    A run that is continued, or rewound, drops the lines that it will repeat; Weights & Biases
    cannot, and shows both.

    Args: step: of the state that the run goes on from; project: "" for no Weights & Biases;
      config: of the run, as JSON.

    Raises ValueError where wandb is asked for and not installed.
    """

    def __init__(self, run: Path, step: int, project: str, config: dict):
        run.mkdir(parents=True, exist_ok=True)
        _write(run / "train.json", json.dumps(config, indent=1))
        self._file = run / "metrics.jsonl"
        self._events = EventFileWriter(str(run / "tensorboard"))
        self._wandb = _start_wandb(run, project, config) if project else None
        self.go_back(step)

    def go_back(self, step: int) -> None:
        """Drops what was written behind a step."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        _write(self._file, "".join(f"{line}\n" for line in kept))
        # TensorBoard hides what an earlier file has of this step and those behind it.
        start = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line of the log."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        self._add(step, [Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._events.flush()
        if self._wandb:
            self._wandb.log({"step": step} | values)

    def write_samples(self, step: int, picture: np.ndarray | None, text: str) -> None:
        """A picture, uint8 [H, W, 3], and a text, both for TensorBoard and Weights & Biases."""
        about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        values = [Summary.Value(tag="samples/text", metadata=about, tensor=tensor)]
        if picture is not None:
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            height, width, _ = picture.shape
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=png.getvalue()
            )
            values.append(Summary.Value(tag="samples/images", image=image))
        self._add(step, values)
        if self._wandb:
            import wandb

            shown = wandb.Html(f"<pre>{html.escape(text)}</pre>")
            if picture is not None:
                shown = wandb.Image(picture, caption=text)
            self._wandb.log({"step": step, "samples": shown})

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        summary = Summary(value=values)
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._events.close()
        if self._wandb:
            self._wandb.finish()


class NoLog:
    """Takes what a Log takes and keeps nothing: on all processes but the first."""

    def go_back(self, step: int) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def write_samples(self, step: int, picture: np.ndarray | None, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # cut off in the middle of a write


def _start_wandb(run: Path, project: str, config: dict):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "wandb is not installed: pip install wandb, or leave the config's wandb empty."
        ) from error
    # The id stays with the run: continued, it goes on in the same plot.
    file, name = run / "wandb_id", "-".join(run.resolve().parts[-2:])
    known = file.read_text("utf-8") if file.exists() else None
    begun = wandb.init(
        project=project, id=known, name=name, dir=str(run), config=config, resume="allow"
    )
    file.write_text(begun.id, "utf-8")
    # Its own count of steps never goes back, and a rewound run does.
    begun.define_metric("*", step_metric="step")
    return begun


class Trace:
    """A profiler's trace of some steps, from the third on: the first ones compile.

    Args: folder: for `tensorboard --logdir` or xprof. first: number of the first step that runs;
      steps: how many to trace, 0 for none.
    """

    def __init__(self, folder: Path, first: int, steps: int):
        self._folder = folder
        self._from, self._until = first + 2, first + 2 + steps
        self._running = False

    def before(self, step: int) -> None:
        """To be called before every step."""
        if self._from <= step < self._until and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: object, last: bool) -> None:
        """To be called after every step, with what it computes."""
        if self._running and (step >= self._until or last):
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
            print(f"the trace is in {self._folder}")
