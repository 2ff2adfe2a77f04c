"""Write docs/reference/config.md: every field of a pretraining configuration, with its value in each preset.

Run from the repository: python scripts/make_config_reference.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

from isimed_index.config import Augmentation, Preset, PretrainConfig, pretrain_config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "config.md"
NOTE = "<!-- Written by scripts/make_config_reference.py: change the code or the script's meanings, then run it. -->"
INTRO = """The fields of `isimed pretrain --config FILE.toml`, with their values in each preset. A file may hold any of
them; what it leaves out is the preset's. Those of the second table stand in the file under `[augmentation]`.
`--preset paper` lays other values over its own for the methods `barlowtwins`, `simclr` and `regisimed`. A share or a
probability is from 0 to 1.

```toml
epochs = 60
near_mm = 10.0

[augmentation]
rotation_deg = 15.0
```"""
MEANINGS = {  # field: unit, meaning
    "method": ("", "the training objective"),
    "network": ("", "`stem` and `valid` are exactly convolutional; `densenet121` is the paper's, patch by patch"),
    "width": ("channels", "of the first layers of `stem` and `valid`"),
    "embedding_dim": ("", "length of the vector that distances are learned in"),
    "descriptor_dim": ("", "length of the vector that matches are found by"),
    "spacing_mm": ("mm", "edge of a voxel that the network sees; scans are resampled to it"),
    "window_low": ("intensity", "value that goes to -1, such as -1000 HU; equal ends: percentiles of each scan do"),
    "window_high": ("intensity", "value that goes to 1"),
    "clip": ("", "scaled intensities are cut off at ± this; 0: nowhere"),
    "view_vox": ("voxels", "edge of a view: 32, 36, 40, …; a patch is 32"),
    "crops_per_scan": ("", "places that a step draws in each scan"),
    "views_per_crop": ("", "augmented views of each place, 1 or 2"),
    "places": ("", "where crops lie: centred on the foreground, or inside of its box"),
    "near_crops": ("share", "of the crops after a scan's first that lie within 40 mm of another"),
    "border_probability": ("probability", "of a crop up to half a patch away from the foreground"),
    "batch_scans": ("scans", "in a step"),
    "patches_per_scan": ("patches", "or pairs of views, of each scan that a step's objective sees"),
    "epochs": ("", "how many"),
    "steps_per_epoch": ("steps", "0: as many as show every scan once"),
    "pairs": ("", "whose distances are learned: pairs within scans, or all of the batch"),
    "registered_to": ("", "id of the reference of `isimed register` whose frame pairs across scans are measured in"),
    "registered_kind": ("", "which transforms to that reference"),
    "unit_mm": ("mm", "physical distance that a latent distance of 1 stands for"),
    "near_mm": ("mm", "a pair counts 1 / (distance + this); 0: every pair counts the same"),
    "distance_weight": ("", "of the distance objective of `isimed`; 0: left out"),
    "coordinate_weight": ("", "of the coordinate objective of `isimed`; 0: left out"),
    "descriptor_weight": ("", "of the descriptor objective of `isimed`; 0: left out"),
    "ignore_mm": ("mm", "places of a scan that are nearer than this are no negatives of each other"),
    "descriptor_temperature": ("", "of the descriptor objective"),
    "huber": ("units", "error, in `unit_mm`, beyond which the loss is linear; 0: squared errors"),
    "charts_after": ("epochs", "after which every scan is carried by a chart of its own; 0: none is"),
    "redundancy_weight": ("", "of what is not on the diagonal, in `barlowtwins`"),
    "barlowtwins_weight": ("", "of that loss in `regisimed`"),
    "simclr_temperature": ("", "of `simclr`"),
    "learning_rate": ("", "of AdamW, at its highest"),
    "weight_decay": ("", "of AdamW"),
    "schedule": ("", "how the learning rate falls"),
    "decay": ("per epoch", "factor of the schedule `exponential`"),
    "warmup_steps": ("steps", "in which the learning rate rises"),
    "clip_norm": ("", "largest norm of the gradient; 0: any"),
    "ema": ("per step", "decay of the moving average of the weights that is stored; 0: the weights as they are"),
    "validation_share": ("share", "of the subjects that are held out; the best epoch by them is stored"),
    "patience": ("epochs", "without a better validation loss, after which training stops; 0: never"),
    "checkpoint_minutes": ("min", "between checkpoints within an epoch"),
    "precision": ("", "of the computation; `auto`: bfloat16 where the processor or GPU has it"),
    "seed": ("", "of everything random"),
    "cache_gib": ("GiB", "of prepared scans that stay in memory"),
    "sampler_threads": ("threads", "that draw batches; 0: half as many as there are cores, eight at most"),
    "rotation_deg": ("degrees", "largest rotation of a view"),
    "scale": ("share", "largest change of size of a view"),
    "curve_probability": ("probability", "of a random contrast curve"),
    "arbitrary_curve_probability": ("probability", "that a curve is not monotone"),
    "invert_probability": ("probability", "that a curve is turned upside down"),
    "bias": ("", "sd of the log of a smooth shading field"),
    "noise": ("intensity", "largest sd of the noise, in units of the -1…1 range"),
    "slices_probability": ("probability", "that a view has the resolution of slices"),
    "thickest_vox": ("voxels", "thickness of the thickest slices"),
    "shift_vox": ("voxels", "how far each of two views of a place may lie from it"),
    "holes": ("", "the paper's: six boxes are dropped, or all but six are"),
    "shuffle_probability": ("probability", "the paper's: the voxels of two cubes are shuffled"),
}


def page() -> str:
    """The fields of the configuration and of its table `augmentation`."""
    presets = {name: dataclasses.asdict(pretrain_config(name)) for name in get_args(Preset)}
    augmentations = {name: values["augmentation"] for name, values in presets.items()}
    parts = ["# The configuration of a training", NOTE, INTRO, "## Fields", _table(PretrainConfig, presets)]
    return "\n\n".join([*parts, "## `[augmentation]`", _table(Augmentation, augmentations)]) + "\n"


def _table(kind: type[Any], presets: dict[str, dict[str, Any]]) -> str:
    rows = [f"| field | type | {' | '.join(presets)} | unit | meaning |", "|---|---|" + "---|" * (len(presets) + 2)]
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            continue
        choices = ", ".join(f"`{choice}`" for choice in get_args(hint)) or hint.__name__
        values = " | ".join(str(values[name]) for values in presets.values())
        rows.append(f"| `{name}` | {choices} | {values} | {' | '.join(MEANINGS[name])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
