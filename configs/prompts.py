"""What the stages draw on the way, from the same seeds each time; one for each thing to look at."""

PROMPTS = (
    "a photo of a red fox in the snow",
    "two cups of coffee on a wooden table",
    "a green cube on top of a blue sphere",
    "a watercolor of a harbor at dawn",
)
