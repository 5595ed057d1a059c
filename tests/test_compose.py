"""docker-compose.yml: its structure, and its own commands run as processes, without Docker."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
import yaml

from tests.conftest import ROOT, Processes, free_ports, until

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
GPU_WORKERS = ["gpu-worker-1", "gpu-worker-2"]
WORKERS = ["worker-1", "worker-2", *GPU_WORKERS]
DAEMONS = ["scheduler", *WORKERS]
BACKENDS = re.compile("keras|tensorflow|jax|torch", re.IGNORECASE)


def extras(service):
    return [name for name in SERVICES[service]["build"]["args"]["EXTRAS"].split(",") if name]


def option(service, name):
    command = SERVICES[service]["command"]
    return command[command.index(name) + 1]


def test_services_are_the_cluster_the_demo_and_the_doctor():
    assert sorted(SERVICES) == sorted([*DAEMONS, "demo", "doctor"])


def test_only_gpu_workers_and_the_doctor_wait_for_a_profile():
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert [profiles.pop(name) for name in GPU_WORKERS] == [["gpu"]] * 2
    assert profiles.pop("doctor") == ["doctor"]
    assert not any(profiles.values())


def test_nothing_brings_a_backend_into_the_scheduler():
    service = SERVICES["scheduler"]
    assert extras("scheduler") == []
    assert set(service["build"]["args"]) == {"EXTRAS"}
    assert not BACKENDS.search(str(service.get("environment", "")))
    assert not {"volumes", "entrypoint"} & set(service)
    assert service["image"] not in [SERVICES[name]["image"] for name in [*WORKERS, "demo"]]


def test_dockerfile_installs_by_its_arguments_alone():
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    installs = [line for line in dockerfile.splitlines() if "install" in line and "RUN" in line]
    assert installs == [
        'RUN pip install --no-cache-dir ".${EXTRAS:+[${EXTRAS}]}" ${PACKAGES}'
    ]  # fmt: skip
    assert 'ARG EXTRAS=""' in dockerfile
    assert 'ARG PACKAGES=""' in dockerfile


def test_what_the_dockerfile_copies_is_here_and_not_ignored():
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().split()
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    for line in re.findall("^COPY (.+) .+$", dockerfile, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_built_of_what_the_package_offers(service):
    import importlib.metadata

    offered = importlib.metadata.metadata("dask-keras-serialize").get_all("Provides-Extra")
    build = SERVICES[service]["build"]
    assert set(extras(service)) <= set(offered)
    assert (ROOT / build["context"]).resolve() == ROOT.resolve()
    assert (ROOT / build["dockerfile"]).is_file()


def test_backends_are_where_they_are_needed():
    assert extras("worker-1") == extras("worker-2") == ["tensorflow-cpu"]
    assert "tensorflow-cpu" in extras("demo")
    assert "tensorflow-cpu" in extras("doctor")
    for worker in GPU_WORKERS:
        assert extras(worker) == ["tensorflow"]
        assert SERVICES[worker]["build"]["args"]["PACKAGES"] == "tensorflow[and-cuda]"


@pytest.mark.parametrize("service", DAEMONS)
def test_health_is_checked(service):
    check = SERVICES[service]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert (ROOT / check["test"][2]).is_file()
    assert check["test"][3:] == ["http://scheduler:8787"] + [service] * (service != "scheduler")
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


@pytest.mark.parametrize("worker", WORKERS)
def test_workers_wait_for_the_scheduler(worker):
    assert SERVICES[worker]["depends_on"] == {"scheduler": {"condition": "service_healthy"}}
    assert SERVICES[worker]["command"][:3] == ["dask", "worker", "tcp://scheduler:8786"]
    assert option(worker, "--nthreads") == "1"
    assert option(worker, "--name") == worker


def test_demo_waits_for_scheduler_and_cpu_workers():
    healthy = {"condition": "service_healthy"}
    awaited = ["scheduler", "worker-1", "worker-2"]
    assert SERVICES["demo"]["depends_on"] == dict.fromkeys(awaited, healthy)
    assert option("demo", "--scheduler") == "tcp://scheduler:8786"
    (volume,) = SERVICES["demo"]["volumes"]
    assert volume == f"./{option('demo', '--output')}:/app/{option('demo', '--output')}"


@pytest.mark.parametrize("worker", GPU_WORKERS)
def test_gpu_workers_reserve_a_gpu_and_say_so(worker):
    reserved = SERVICES[worker]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert option(worker, "--resources") == "GPU=1"


def test_gpu_workers_share_its_memory():
    assert sum(float(option(worker, "--memory")) for worker in GPU_WORKERS) < 1
    assert not any("GPU" in name for name in SERVICES["gpu-worker-1"]["environment"])


def test_ports_are_published_to_this_machine_alone():
    ports = SERVICES["scheduler"]["ports"]
    assert ports == ["127.0.0.1:8786:8786", "127.0.0.1:8787:8787"]
    assert not any("ports" in SERVICES[name] for name in [*WORKERS, "demo"])


class Here:
    """Runs a service's commands on this machine: another host name, other ports."""

    def __init__(self, core_bin: Path, output: Path) -> None:
        self.core_bin = core_bin
        self.output = output
        self.ports = dict(zip(("8786", "8787"), free_ports(2), strict=True))

    def command(self, service: str, words: list[str]) -> list[str]:
        """Translate a command; the program is the one of the image's counterpart."""
        # what the image has: no extras, no backend
        folder = Path(sys.executable).parent if extras(service) else self.core_bin
        return [str(folder / words[0]), *map(self._word, words[1:])]

    def _word(self, word: str) -> str:
        if word == option("demo", "--output"):
            return str(self.output)
        for port, free in self.ports.items():
            word = re.sub(rf"\b{port}$", free, word)
        return word.replace("//scheduler:", "//127.0.0.1:")

    def environment(self, service: str) -> dict[str, str]:
        return SERVICES[service].get("environment", {})

    def run(self, service: str) -> subprocess.CompletedProcess[str]:
        """Run a service's command to its end."""
        return subprocess.run(
            self.command(service, SERVICES[service]["command"]),
            cwd=ROOT,
            env=os.environ | self.environment(service),
            capture_output=True,
            text=True,
            timeout=180,
        )

    def check(self, service: str) -> subprocess.CompletedProcess[str]:
        """Run a service's health check once."""
        return subprocess.run(
            self.command(service, SERVICES[service]["healthcheck"]["test"][1:]),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def wait_until_healthy(self, service: str) -> None:
        """Repeat the health check, as Docker does, as often as the file says."""
        health = SERVICES[service]["healthcheck"]
        pause = float(health["interval"].removesuffix("s"))
        patience = float(health["start_period"].removesuffix("s")) + pause * health["retries"]
        deadline = time.monotonic() + patience
        while (result := self.check(service)).returncode:
            assert time.monotonic() < deadline, result.stderr
            time.sleep(min(pause, 0.5))


@pytest.mark.cluster
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the file's images have TensorFlow"
)
@pytest.mark.programs
def test_the_commands_run(core_bin: Path, processes: Processes, tmp_path: Path):
    """The very commands and health checks of the file, in the order it asks for."""
    here = Here(core_bin, tmp_path / "output")
    for module in ("keras", "tensorflow"):
        script = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is not None)"
        assert subprocess.run([core_bin / "python", "-c", script]).returncode == 0

    assert "does not answer" in here.check("scheduler").stderr
    processes.start(*here.command("scheduler", SERVICES["scheduler"]["command"]))
    here.wait_until_healthy("scheduler")
    assert "worker-1 has not joined" in here.check("worker-1").stderr
    for worker in ("worker-1", "worker-2"):
        processes.start(
            *here.command(worker, SERVICES[worker]["command"]), env=here.environment(worker)
        )
    for worker in ("worker-1", "worker-2"):
        here.wait_until_healthy(worker)

    demo = here.run("demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr + processes.log(0)
    assert "workers that hold the model: 2" in demo.stdout
    assert "comparisons are bit-equal" in demo.stdout
    assert (tmp_path / "output" / "demo.png").is_file()
    for service in DAEMONS[:3]:  # still, after the work
        assert here.check(service).returncode == 0
    assert "Traceback" not in "".join(processes.log(i) for i in range(3))

    doctor = here.run("doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    # a GPU worker has one, or does not start
    processes.start(
        *here.command("gpu-worker-1", SERVICES["gpu-worker-1"]["command"]),
        env=here.environment("gpu-worker-1") | {"CUDA_VISIBLE_DEVICES": "-1"},
    )
    refusal = "device='gpu' is asked for, and 0 GPUs are there"
    until(lambda: refusal in processes.log(3), "a GPU worker starts without one", 60)
    assert here.check("gpu-worker-1").returncode
