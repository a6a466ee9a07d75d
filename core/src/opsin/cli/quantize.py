"""``opsin quantize``: round a checkpoint's weights once, so that no start has to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from opsin.cli.errors import Debug, reported
from opsin.cli.printing import print_table
from opsin.config import EngineConfig
from opsin.errors import CheckpointError

app = App(
    "quantize",
    help_epilogue="""Examples:

  opsin quantize ./model ./model-int8 --to int8
  opsin quantize owner/name ./model-int4 --to int4 --group-size 64
  opsin serve ./model-int8                    # needs opsin-weight-formats

What is written is a compressed-tensors checkpoint with the weights that `--quantization` makes at each start.
""",
)


@app.default
@reported
def run(
    model: str,
    out: Path,
    *,
    to: Literal["int8", "int4"],
    group_size: Literal[32, 64, 128] | None = None,
    revision: str | None = None,
    as_json: Annotated[bool, Parameter("--json")] = False,
    debug: Debug = False,
) -> None:
    """Round a checkpoint's weights to the nearest, and say what that did to each.

    Args:
        model: Folder, name of an installed checkpoint, or hub id; its weights are floats.
        out: Folder to write; must not exist. It appears when everything is written.
        to: Bits of the decoder's weights; at int4, all others have 8.
        group_size: Inputs that share a scale in the decoder. Default: 32 for int4, all of a row for int8.
        revision: Revision on the hub.
        as_json: Print one JSON object instead of the table.
        debug: Show the traceback of an error.
    """
    import json

    from opsin.checkpoint import files
    from opsin.checkpoint.rounded import forms_of, write_rounded
    from opsin.plugins import load_plugins
    from opsin.rank.sizing import resolve_rounding

    config = EngineConfig(model=model, quantization=to, quantization_group_size=group_size)
    checkpoint = files.load(model, revision)
    if checkpoint.quantization() is not None:
        raise CheckpointError(f"{model} is quantised already; take the checkpoint of floats it was made from")
    spec = load_plugins().model(checkpoint.architecture)
    forms = forms_of(checkpoint, spec, resolve_rounding(config, None))
    done = list(write_rounded(checkpoint, forms, out))
    saved = sum(layer.saved_bytes for layer in done)
    worst = max(done, key=lambda layer: layer.error)
    if as_json:
        layers = [
            {"key": layer.key, "form": layer.form.kind, "error": round(layer.error, 6)} for layer in done
        ]
        print(json.dumps({"out": str(out), "saved_bytes": saved, "layers": layers}))
        return
    shown = [(layer.key, layer.form.kind, f"{100 * layer.error:.2f} %") for layer in done]
    print_table("Rounded", ("tensor", "form", "error"), shown)
    print(
        f"{len(done)} tensors rounded, {saved / 1e6:.1f} MB less; largest error {100 * worst.error:.2f} % "
        f"({worst.key}).\nWrote {out}."
    )
