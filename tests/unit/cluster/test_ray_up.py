"""cluster/aws.yaml and gcp.yaml: Ray's own schema, and the rules of cluster/README.md."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

CLUSTER = Path(__file__).parents[3] / "cluster"
README = (CLUSTER / "README.md").read_text()
SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"

WORLD = ("0.0.0.0/0", "::/0")


@pytest.fixture(params=["aws", "gcp"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return loaded


def validate(config: dict[str, Any]) -> None:
    jsonschema.validate(config, json.loads(SCHEMA.read_text()))


def test_it_is_what_ray_reads(config: dict[str, Any]) -> None:
    validate(config)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        validate(config | {"max_worker": 3})


def test_it_scales_on_spot_gpu_nodes(name: str, config: dict[str, Any]) -> None:
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["resources"]["GPU"] == 1
    assert worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
    node = worker["node_config"]
    spot = node["InstanceMarketOptions"]["MarketType"] if name == "aws" else node["scheduling"]["provisioningModel"]
    assert spot.lower() == "spot"
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}, "the head is for drivers, not for training"
    assert "InstanceMarketOptions" not in head["node_config"]
    assert "scheduling" not in head["node_config"], "a head taken back ends every run"


def test_nothing_is_open_to_the_world(name: str, config: dict[str, Any]) -> None:
    text = (CLUSTER / f"{name}.yaml").read_text()
    assert not any(range_ in text for range_ in WORLD)
    for node_type in config["available_node_types"].values():
        if name == "aws":
            # Without a group of one's own Ray makes one that opens port 22 to the internet.
            assert node_type["node_config"]["SecurityGroupIds"] == ["REPLACE_SECURITY_GROUP"]
            assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        else:
            [interface] = node_type["node_config"]["networkInterfaces"]
            assert interface["subnetwork"].endswith("/subnetworks/dngd"), "not the default network, open on port 22"
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "security_group" not in config["provider"]


def test_the_readme_opens_nothing_to_the_world() -> None:
    assert not any(range_ in README for range_ in WORLD)
    opened = re.findall(r"--(?:cidr|source-ranges) (\S+)", README)
    assert sorted(set(opened)) == ["10.10.0.0/20", "YOUR_ADDRESS/32"]


def test_the_token_is_on_every_node(config: dict[str, Any]) -> None:
    assert config["file_mounts"]["/var/lib/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_MODE=token" in (CLUSTER / "Dockerfile").read_text()
    assert not any("RAY_AUTH_MODE" in option for option in config["docker"]["run_options"]), "the image has it on"


def test_mounted_files_exist(config: dict[str, Any]) -> None:
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (CLUSTER / local).is_file(), local


def test_the_container_has_no_more_than_it_needs(config: dict[str, Any]) -> None:
    options = config["docker"]["run_options"]
    assert "--cap-drop ALL" in options
    assert "--security-opt no-new-privileges" in options
    assert not any("privileged" in option.removeprefix("--security-opt no-new-") for option in options)
    assert "--volume /mnt/nvme/dngd:/cache" in options, "stores are staged on the node's NVMe"
    assert "DNGD_CACHE_DIR=/cache/dngd" in (CLUSTER / "Dockerfile").read_text()


def test_runs_are_copied_to_object_storage(name: str, config: dict[str, Any]) -> None:
    scheme = {"aws": "s3", "gcp": "gs"}[name]
    [line] = [line for line in config["head_start_ray_commands"] if "sync_runs.py" in line]
    assert f"/shared/runs {scheme}://REPLACE_BUCKET/runs" in line


def test_shell_commands_parse(config: dict[str, Any]) -> None:
    commands = [line for key, value in config.items() if key.endswith("_commands") for line in value]
    assert len(commands) >= 7
    for command in commands:
        done = subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stderr == "", command


def test_what_is_to_be_replaced_is_in_the_readme(name: str) -> None:
    words = set(re.findall(r"REPLACE_[A-Z_]+", (CLUSTER / f"{name}.yaml").read_text()))
    section = README.split({"aws": "## AWS", "gcp": "## Google Cloud"}[name])[1].split("\n## ")[0]
    assert words == set(re.findall(r"REPLACE_[A-Z_]+", section))
