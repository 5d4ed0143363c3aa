"""The same preparation on a real Ray cluster of this machine."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from launcher.job.embedded_ray import isolated
from launcher.job.session import session
from prepare_command import COMMAND, content_of, environment, prepared, write_config, write_corpus

PATIENCE_SECONDS = 60  # only a broken program waits this long
pytestmark = pytest.mark.timeout(3 * PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "corpus", num_files=4)
    return write_config(folder / "config.yaml", sources=[str(folder / "corpus")], dedup={"fuzzy": "standard"})


@pytest.fixture(scope="module")
def local(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(config, tmp_path_factory.mktemp("local") / "out")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of one machine, with a token of its own, which only this machine reaches."""
    with session() as folder, isolated():
        os.environ["RAY_TMPDIR"] = str(folder)  # `isolated` removes it at its end
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=2, include_dashboard=False, node_ip_address="127.0.0.1")
            yield cluster.address
        finally:
            cluster.shutdown()


def on_ray(address: str, config: Path, out: object, cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, str(config), "--out", str(out), "--ray", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # or Ray puts the machine's address in the place of 127.0.0.1, where the cluster does not listen
        env=environment() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        cwd=cwd,
    )


def test_without_a_cluster_it_is_one_line(config: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        run = on_ray(address, config, tmp_path / "out", tmp_path)
        _, errors = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith(f"error: --ray {address}: no Ray cluster to connect to (nothing answers at")
    assert line.endswith("); start one, or leave --ray out")
    assert not (tmp_path / "out").exists()


def test_it_gives_the_bytes_of_local_workers(address: str, config: Path, local: Path, tmp_path: Path) -> None:
    """The output is named from where the user stands, and Ray's workers stand elsewhere."""
    started = time.monotonic()
    run = on_ray(address, config, "out", cwd=tmp_path)
    output, errors = run.communicate(timeout=2 * PATIENCE_SECONDS)
    print(f"on Ray: {time.monotonic() - started:.1f} s\n{output}")
    assert run.returncode == 0, errors
    assert content_of(tmp_path / "out") == content_of(local)


def ray_workers_at_work() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::_run"):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def test_a_killed_worker_is_replaced(address: str, config: Path, local: Path, tmp_path: Path) -> None:
    run, killed = on_ray(address, config, tmp_path / "out", cwd=tmp_path), 0
    while run.poll() is None and killed < 2:
        for process in ray_workers_at_work()[:1]:
            process.send_signal(signal.SIGKILL)
            killed += 1
            process.wait(PATIENCE_SECONDS)
        time.sleep(0.005)
    _, errors = run.communicate(timeout=2 * PATIENCE_SECONDS)
    assert run.returncode == 0, errors
    assert killed == 2
    assert content_of(tmp_path / "out") == content_of(local)


def test_a_bad_split_is_the_same_there(address: str, config: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", num_files=1)
    (tmp_path / "corpus/bad.parquet").write_bytes(b"PAR1")
    run = on_ray(
        address, write_config(tmp_path / "c.yaml", sources=[str(tmp_path / "corpus")]), tmp_path / "o", tmp_path
    )
    _, errors = run.communicate(timeout=2 * PATIENCE_SECONDS)
    assert run.returncode == 1
    assert "1 of 2 splits failed and data.max_bad_splits allows 0" in errors and len(errors.splitlines()) == 1
