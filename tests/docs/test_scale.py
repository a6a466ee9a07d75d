"""What docs/scale.md and docs/kuberay.yaml say holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from opsin.errors import ConfigError
from opsin.layers import DecoderConfig, kv_geometry

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "scale.md").read_text()


def test_numbers_of_ranks() -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+) / (\d+) \| ([\d, ]+) \|$", PAGE, re.M)
    assert len(rows) == 5
    for heads, kv_heads, listed in rows:
        config = DecoderConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=4096,
            num_layers=1,
            num_heads=int(heads),
            num_kv_heads=int(kv_heads),
            head_size=8,
            eps=1e-6,
        )
        told = [int(text) for text in listed.split(",")]
        for ranks in (2, 4, 8, 16):
            if ranks in told:
                kv_geometry(config, ranks)
            elif ranks <= max(told):
                with pytest.raises(ConfigError, match="cannot be divided"):
                    kv_geometry(config, ranks)


def test_the_kubernetes_manifest() -> None:
    """Its form; Ray's own schema reads the application in tests/ray."""
    manifest = yaml.safe_load((DOCS / "kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert container["image"]
            assert container["resources"]["limits"]
    [application] = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    source = Path(__file__).parents[2] / "core/src" / module.replace(".", "/") / "__init__.py"
    assert f"def {name}(arguments" in source.read_text()
    assert application["args"]["model"]
