"""``cluster.yaml`` is what ``ray up`` accepts, and opens nothing to the world."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.config import from_command_line


@pytest.fixture
def cluster() -> dict[str, Any]:
    text = (Path(__file__).resolve().parents[1] / "cluster.yaml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_ray_accepts_the_configuration_with_its_defaults(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_would_refuse_an_unknown_field(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="no_such_field"):
        validate_config(prepare_config(cluster | {"no_such_field": 1}))


def test_the_head_only_coordinates_and_all_else_scales_from_zero(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    workers = {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}
    assert workers.keys() == {"gpu", "cpu"}
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert all(
        kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for kind in workers.values()
    )
    assert cluster["max_workers"] == sum(kind["max_workers"] for kind in workers.values())


def test_every_node_asks_for_tokens_and_no_port_is_public(cluster: dict[str, Any]) -> None:
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert kind["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    starts = [cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token ray start" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "security_group" not in cluster["provider"], "Ray's own group opens nothing but SSH"
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_command_in_the_comments_is_valid() -> None:
    text = (Path(__file__).resolve().parents[1] / "cluster.yaml").read_text()
    comment = " ".join(line.lstrip("# ").rstrip("\\") for line in text.splitlines() if line.startswith("#"))
    arguments = comment.split("python jobs/caption_corpus.py ")[1].split(" ray down")[0].split()
    parsed = from_command_line(arguments)
    assert (parsed.device, parsed.autoscaling, parsed.partition.max_actors) == ("cuda", True, 16)
