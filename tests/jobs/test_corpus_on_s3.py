"""A corpus that lies in S3, captioned into S3 by a service that fails now and then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset

from jobs import caption_corpus as job
from tests.pictures import picture, saved
from tests.pipeline.inputs import write_tar
from tests.pipeline.s3 import S3Server

NUM_SAMPLES = 60


def upload_shards(server: S3Server, bucket: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Three tars of pictures with their JSON, one picture broken; the JSON by key."""
    told = {f"{number:06d}": {"number": number, "tags": ["a", "b"]} for number in range(NUM_SAMPLES)}
    for shard in range(3):
        members = {}
        for key, about in list(told.items())[shard::3]:
            good = saved(picture(40 + about["number"], 50), "JPEG")
            members[f"{key}.jpg"] = b"no picture" if key == "000031" else good
            members[f"{key}.json"] = json.dumps(about).encode()
        tar = write_tar(folder / f"{shard:05d}.tar", members)
        server.fill(bucket, {f"in/{tar.name}": tar.read_bytes()})
    return told


@pytest.mark.ray
@pytest.mark.slow
def test_webdataset_in_s3_to_webdataset_in_s3_through_faults_and_a_kill(
    tmp_path: Path, checkpoint: Path
) -> None:
    server = S3Server.start()
    bucket = server.make_bucket()
    told = upload_shards(server, bucket, tmp_path)
    command = [sys.executable, job.__file__, f"--input={bucket}/in", f"--output={bucket}/out"]
    command += [f"--model={checkpoint}", "--max-new-tokens=3", f"--s3-endpoint={server.endpoint}"]
    command += ["--formats=webdataset", "--keep-images"]
    command += ["--rows-per-unit=4", "--rows-per-file=20", "--io-attempts=12"]
    environment = os.environ | server.environment | {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with server.faults(rate=0.05, seed=3) as faults:
        with subprocess.Popen(command, env=environment, stderr=(tmp_path / "killed").open("wb")) as killed:
            while killed.poll() is None and not server.objects(bucket, "out/_work/units/"):
                time.sleep(0.1)
            killed.send_signal(signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL, (tmp_path / "killed").read_text()[-4000:]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert sum(faults.seen.values()) > 10, faults.seen

    found = server.objects(bucket, "out/")
    server.stop()
    assert "out/_SUCCESS" in found
    captions, dead_letters = (
        [
            row
            for key in sorted(found)
            if key.startswith(f"out/{name}/") and key.endswith(".parquet")
            for row in pq.read_table(BytesIO(found[key])).to_pylist()
        ]
        for name in ("captions", "dead_letters")
    )
    assert [row["key"] for row in dead_letters] == ["000031"]
    assert sorted(row["key"] for row in captions) == sorted(told.keys() - {"000031"})
    check_webdataset(
        {key: data for key, data in found.items() if key.endswith(".tar")},
        {row["key"]: row["caption"] for row in captions},
        told,
        tmp_path,
    )


def check_webdataset(
    tars: dict[str, bytes], captions: dict[str, str], told: dict[str, dict[str, Any]], folder: Path
) -> None:
    """Every sample of the library's own reader has its caption, picture and JSON."""
    (folder / "read").mkdir()
    for key, data in tars.items():
        (folder / "read" / Path(key).name).write_bytes(data)
    files = sorted(str(file) for file in (folder / "read").iterdir())
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert sorted(sample["__key__"] for sample in samples) == sorted(captions)
    for sample in samples:
        key = sample["__key__"]
        assert sample["txt"].decode() == captions[key]
        assert sample["jpg"].startswith(b"\xff\xd8")
        carried = json.loads(sample["json"])
        assert told[key].items() <= carried.items() or carried["json"] == told[key], carried
