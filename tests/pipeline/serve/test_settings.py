"""Settings from flags, YAML and serve.yaml, and how a cluster's size completes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hired.budget import Budget
from hired.errors import ConfigurationError
from pipeline.serve.deployments import application, build, settled
from pipeline.serve.keys import Keys
from pipeline.serve.options import flag, from_command_line, from_tree, leaves, reference
from pipeline.serve.settings import Settings, exceeds

ROOT = Path(__file__).resolve().parents[3]
KEY = "a-key-of-this-server"


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("token_budget: 0.1\nlimits: {images: 3, in_flight: 9}\npolicies: [hired, keep-all]\n")
    flags = "--limits.images 5 --port 9000 --high-token-budget 576 --https-hosts a.example,b.example"
    settings, address = from_command_line(["--config", str(file), *flags.split(), "--without-keys"])
    assert (settings.token_budget, settings.limits.images, settings.limits.in_flight) == (0.1, 5, 9)
    assert settings.allowed_policies == ("hired", "keep-all")
    assert settings.high_token_budget == 576
    assert settings.https_hosts == ("a.example", "b.example")
    assert settings.without_keys
    assert (address.host, address.port) == ("127.0.0.1", 9000)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"limit": {}}, "unknown setting 'limit'"),
        ({"limits": {"picture": 1}}, "limits.picture"),
        ({"limits": {"images": 0}}, "limits.images"),
        ({"encode": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas 2 is below"),
        ({"max_token_budget": 0.1}, "max_token_budget"),
        ({"default_max_tokens": 5000}, "limits.max_tokens"),
    ],
)
def test_wrong_settings_are_named(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        from_tree(tree)


@pytest.mark.parametrize(
    ("budget", "most", "is_above"),
    [
        (0.2, 1.0, False),
        (576, 1.0, False),
        (0.3, 0.2, True),
        (99, 98, True),
        (98, 98, False),
        (0.1, 98, True),
        (5, 0.5, True),
    ],
)
def test_a_rate_and_a_number_are_compared_only_where_they_can_be(
    budget: float, most: float, is_above: bool
) -> None:
    assert exceeds(budget, most) == is_above


def test_budgets_follow_detail_unless_the_request_has_its_own() -> None:
    settings = Settings()
    assert settings.budget("low") == Budget(rate=0.05)
    assert settings.budget("high", 64, 0.25) == Budget(tokens=64, alpha=0.25)


def test_one_of_each_stage_fits_two_cores_and_one_gpu() -> None:
    for num_cpus, num_gpus, device in ((2, 0, "cpu"), (8, 1, "cuda"), (64, 0, "cpu")):
        done = settled(Settings(), num_cpus, num_gpus)
        stages = [done.ingress, done.partition, done.encode, done.generate]
        assert done.device == device
        assert sum(stage.num_cpus or 0 for stage in stages) <= num_cpus
        assert sum(stage.num_gpus or 0 for stage in stages) <= num_gpus
        assert all(stage.threads for stage in stages)


def test_what_the_settings_say_is_not_settled_otherwise() -> None:
    given = Settings.model_validate({"device": "cpu", "generate": {"num_cpus": 1.5, "threads": 3}})
    done = settled(given, 8, 1)
    assert (done.device, done.generate.num_cpus, done.generate.threads) == ("cpu", 1.5, 3)
    assert done.encode.num_gpus == 0


def test_a_share_of_a_gpu_is_a_share_of_its_memory() -> None:
    config = settled(Settings(), 8, 1).config()
    assert config.generate.num_gpus == 0.7


# Clusters


def test_the_file_for_clusters_builds_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    file = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(file)
    [told] = schema.applications
    assert told.import_path == f"{build.__module__}:{build.__name__}"
    monkeypatch.setenv("HIRED_API_KEY", KEY)
    build(told.args)


def test_an_endpoint_of_a_cluster_wants_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIRED_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="HIRED_API_KEY"):
        build({})
    with pytest.raises(ConfigurationError, match="limits"):
        build({"limits": 5})
    build({"without_keys": True})


def test_replicas_that_may_grow_are_scaled_by_what_they_have_in_hand() -> None:
    settings = from_tree({"generate": {"min_replicas": 1, "max_replicas": 4, "target_requests": 10}})
    deployment = application(settings, Keys())._bound_deployment
    *_, generate = deployment.init_args
    options = generate._bound_deployment._deployment_config.autoscaling_config
    assert (options.min_replicas, options.max_replicas, options.target_ongoing_requests) == (1, 4, 10)


# Documentation


def test_the_documentation_is_what_the_code_prints() -> None:
    page = (ROOT / "docs" / "serving-options.md").read_text(encoding="utf-8")
    assert page == reference() + "\n", "run make docs"


def test_every_setting_has_a_meaning_and_a_flag() -> None:
    names = [name for name, _ in leaves(Settings)]
    assert len(names) == len(set(map(flag, names))) > 50
    assert all(field.description for _, field in leaves(Settings))
