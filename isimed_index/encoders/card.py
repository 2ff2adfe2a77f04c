"""The encoder card: everything that changes an embedding, and the id that is its hash. No torch needed to read one."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from isimed_index.contracts import Metric as Metric
from isimed_index.contracts import schema, validate
from isimed_index.errors import EncoderMismatch, StoreDamaged, UsageError
from isimed_index.scans.prepare import Intensity

CARD = "card.json"
WEIGHTS = "weights.safetensors"
MODEL = "model.onnx"
RUN = "run.json"  # beside a card: which training it is the result of, and which stored voxels it was shown
LONGEST_NAME = 200  # characters
AXES = "RAS"  # of stored volumes, and so of the patches that an encoder is shown
Pool = Literal["mean", "centre"]


@dataclass(frozen=True, slots=True)
class EncoderCard:
    """How patches become vectors: network, weights, patch, working spacing and intensity scaling.

    `outputs` maps an output's name to its dimension; `match_output` is the one that matches are searched in, compared
    by `metric`. `weights_sha256` is None for an encoder without weights, and until they are written; `model_sha256` is
    that of an ONNX file instead. `name` and `training` say where the encoder came from and do not enter the id.

    Networks of other programs may see a patch with other `axes`: `SPL` has the first grow to Superior, the second to
    Posterior, the third to Left. `pool` says how a map of vectors becomes the one vector of its patch.
    """

    name: str
    factory: str
    network: Mapping[str, Any]  # arguments of `factory`
    weights_sha256: str | None
    patch_vox: int
    stride_vox: int
    spacing_mm: float
    outputs: Mapping[str, int]
    match_output: str
    metric: Metric
    intensity: Intensity = field(default_factory=Intensity)
    training: Mapping[str, Any] = field(default_factory=dict)
    model_sha256: str | None = None
    axes: str = AXES
    pool: Pool | None = None

    def __post_init__(self) -> None:
        if self.match_output not in self.outputs:
            raise EncoderMismatch(f"expected match_output among {sorted(self.outputs)}, found {self.match_output!r}")
        if sorted(map(_pair, self.axes)) != sorted(map(_pair, AXES)):
            raise EncoderMismatch(
                f"expected axes such as RAS or SPL, one letter of each of RL, AP and SI, found {self.axes!r}"
            )
        if self.pool is not None and self.pool not in get_args(Pool):
            raise EncoderMismatch(f"expected pool among {', '.join(get_args(Pool))}, found {self.pool!r}")

    @property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 over all fields but `name` and `training`."""
        fields = self._fields()
        del fields["name"], fields["training"]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def dim(self) -> int:
        """Dimension of the output that matches are searched in."""
        return self.outputs[self.match_output]

    def _fields(self) -> dict[str, Any]:
        # What a card may lack is left out where it is as it was before there was such a field: old ids stay.
        more = {
            "model_sha256": self.model_sha256,
            "axes": None if self.axes == AXES else self.axes,
            "pool": self.pool,
        }
        return {
            "name": self.name,
            "factory": self.factory,
            "network": dict(self.network),
            "weights_sha256": self.weights_sha256,
            "patch_vox": self.patch_vox,
            "stride_vox": self.stride_vox,
            "spacing_mm": self.spacing_mm,
            "outputs": {
                name: {"dim": dim, "unit": "mm"} if name == "position" else {"dim": dim}
                for name, dim in self.outputs.items()
            },
            "match_output": self.match_output,
            "metric": self.metric,
            "intensity": self.intensity.fields(),
            "training": dict(self.training),
            **{name: value for name, value in more.items() if value is not None},
        }

    def to_json(self) -> dict[str, Any]:
        """The card as stored in `card.json` (schema `card.schema.json`)."""
        return {"id": self.id, **self._fields()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> EncoderCard:
        """Read a card; `EncoderMismatch` when it lacks something or its id is not the hash of its content."""
        validate("card", fields, EncoderMismatch)
        card = cls.described(fields)
        if card.id != fields["id"]:
            raise EncoderMismatch(
                f"the encoder card says id {fields['id']}, its content hashes to {card.id}",
                next_step="restore the card as it was written; cards are not edited by hand",
            )
        return card

    @classmethod
    def described(cls, fields: Mapping[str, Any]) -> EncoderCard:
        """The card that JSON fields describe, whatever id they say; `EncoderMismatch` when one of them is missing."""
        validate("card", {"id": "unknown", **fields}, EncoderMismatch)
        try:
            return cls(
                name=fields["name"],
                factory=fields["factory"],
                network=fields["network"],
                weights_sha256=fields["weights_sha256"],
                patch_vox=fields["patch_vox"],
                stride_vox=fields["stride_vox"],
                spacing_mm=float(fields["spacing_mm"]),
                outputs={name: output["dim"] for name, output in fields["outputs"].items()},
                match_output=fields["match_output"],
                metric=cast(Metric, fields["metric"]),
                intensity=Intensity(**fields["intensity"]),
                training=fields["training"],
                model_sha256=fields.get("model_sha256"),
                axes=fields.get("axes", AXES),
                pool=fields.get("pool"),
            )
        # The schema leaves these to each kind of encoder.
        except (KeyError, TypeError, OverflowError, UsageError) as error:
            raise EncoderMismatch(
                f"the encoder card of {fields['name']!r} lacks what this version needs: {error}"
            ) from error


def _pair(letter: str) -> str:
    """The two ends of the axis that a letter names one of; the letter itself when it names none."""
    return next((ends for ends in ("RL", "AP", "IS") if letter in ends), letter)


def is_name(name: object) -> bool:
    """Whether an encoder may be called so: a text that can be shown, without control characters."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name.isprintable()


def refuse_unknown_fields(fields: Mapping[str, Any], file: str, next_step: str) -> None:
    """Raise `EncoderMismatch` for a field that no card has, before it is silently left out.

    For cards that come from elsewhere. Those of a store are told by their hash, which covers what this version knows.
    """
    known = list(schema("card")["properties"])
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise EncoderMismatch(f"{file}: unknown field {name[:LONGEST_NAME]!r}{hint}", next_step=next_step)


def refuse_odd_position(card: EncoderCard) -> None:
    """Raise `EncoderMismatch` where `position` is not a point in mm, or is what neighbours are searched in."""
    if card.outputs.get("position", 3) != 3:
        raise EncoderMismatch(
            f"expected 3 dimensions of the output 'position', which is millimetres, found {card.outputs['position']}",
            next_step="give the output another name on the card and in the network",
        )
    if card.match_output == "position":
        raise EncoderMismatch(
            "expected match_output to be an output of vectors, found 'position', which is millimetres",
            next_step="give the output another name on the card and in the network, or name another match_output",
        )


def parse_fields(text: str) -> Any:
    """The JSON of a card; `ValueError` when it is none, too deep, or holds NaN or an infinite number.

    JSON has neither, but `1e999` is read as infinite: a card that holds it could be written, and not read again.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("expected the fields of a card, found JSON in too many levels") from None


def _no_number(name: str) -> float:
    raise ValueError(f"expected a number, found {name}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def read_card(directory: Path) -> EncoderCard:
    """The card of an encoder directory (`card.json` beside `weights.safetensors` or `model.onnx`)."""
    try:
        fields = parse_fields((directory / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreDamaged(
            f"the encoder card {CARD} in {directory.name} cannot be read",
            next_step="restore the store from a backup, or train again",
        ) from error
    return EncoderCard.from_json(fields)
