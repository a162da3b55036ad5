"""What a plan says: held against the model, against what a step really takes, and against itself."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.peak import of_a_step
from clipscale.cli import app
from clipscale.config import compose, validate
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.hardware import CATALOGUE, find, render
from clipscale.models import build_model
from clipscale.models.flops import Execution, blocks, flops, trained_parameters
from clipscale.parallel import lock
from clipscale.planner import measure, show
from clipscale.planner.command import Options, _variants, plan
from clipscale.planner.job import Job
from clipscale.planner.memory import memory, state_bytes
from clipscale.planner.plan import make_plan
from clipscale.planner.processes import together
from clipscale.planner.speed import Calibration, speed

LARGE = ["cluster=slurm", "data=synthetic", "precision=amp_bf16"]


def job(*overrides: str, hardware: str = "cpu", tokens: float | None = None) -> Job:
    config, _ = compose(overrides)
    validate(config)
    return Job(config, find(hardware, config.cluster.processes_per_node), tokens)


def run(arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *shlex.split(arguments)], catch_exceptions=False)


SMALL_TEXT = ["model.text.layers=2", "model.text.width=64", "model.text.heads=2", "model.embed_dim=64"]
VIT = ["model=vit_s_16", "model.vision.layers=3", "model.vision.image_size=112", *SMALL_TEXT]


@pytest.mark.parametrize(
    ("overrides", "pairs"),
    [
        (["model=tiny"], 96),
        (["model=tiny", "precision=amp_bf16", "optim.microbatches=4"], 96),
        ([*VIT, "precision=amp_bf16", "parallel.activation_checkpointing=full"], 32),
        (["model=rn50", "model.vision.image_size=64", *SMALL_TEXT], 6),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_peak_is_what_a_step_takes(overrides: list[str], pairs: int) -> None:
    config, _ = compose([*overrides, f"global_batch_size={pairs}"])
    found, tokens = of_a_step(config, pairs)
    needed = memory(Job(config, find("cpu"), max(3.0, tokens)))
    assert needed.total == pytest.approx(found, rel=0.1)
    assert needed.total == needed.state + needed.activations + needed.loss + needed.input


def test_memory_of_layouts() -> None:
    """Bytes of a parameter: 4 of the weight, 8 of moments, 4 of a gradient that stays, 4 of an average, 2 of casts."""
    base = [
        "model=vit_l_14",
        "global_batch_size=512",
        *LARGE,
        "cluster.nodes=2",
        "parallel.activation_checkpointing=full",
    ]
    one, averaged, plain = (
        memory(job(*base, *more, hardware="h200")).state for more in ([], ["ema.decay=0.999"], ["precision=fp32"])
    )
    count = job(*base, hardware="h200").parameters.total
    assert plain == 16 * count and averaged - one == 4 * count and 17 * count < one < 18 * count
    fsdp, hsdp = (
        memory(job(*base, "precision=fp32", f"parallel={way}", hardware="h200")).state for way in ("fsdp", "hsdp")
    )
    assert hsdp - fsdp == pytest.approx(12 * count * (1 / 8 - 1 / 16), rel=1e-6)
    offloaded = memory(job(*base, "parallel=fsdp", "parallel.cpu_offload=true", hardware="h200")).state
    assert offloaded < memory(job(*base, "parallel=fsdp", hardware="h200")).state
    gathered = memory(job(*base, "parallel=fsdp", "optim.microbatches=2", hardware="h200"))
    assert gathered.state > 4 * count and gathered.activations < memory(job(*base, hardware="h200")).activations
    assert state_bytes(job(*base, hardware="h200")) == 12 * count


def test_packed_captions_take_less() -> None:
    short, full = (memory(job("model=vit_b_32", *LARGE, hardware="h100", tokens=tokens)) for tokens in (17, 77))
    assert short.activations < 0.75 * full.activations and short.state == full.state
    assert job("model=vit_b_32", hardware="h100", tokens=30).tokens == pytest.approx(30, rel=0.02)


def test_what_is_locked_is_not_trained() -> None:
    """As the model itself locks its layers; and it has no backward pass."""
    for overrides in (
        ["lock.image=true"], ["lock.image=true", "lock.image_unlocked_groups=1"],
        ["lock.image=true", "lock.image_unlocked_groups=2", "lock.text=true", "lock.text_unlocked_groups=3"],
    ):  # fmt: skip
        config, _ = compose(["model=tiny", "init.weights=here", *overrides])
        model = build_model(config.model)
        lock(model, config.lock)
        expected = sum(p.numel() for tower in (model.visual, model.text) for p in tower.parameters() if p.requires_grad)
        assert trained_parameters(config.model, Execution(lock=config.lock)) == expected, overrides
    config, _ = compose(["model=tiny", "init.weights=here", "lock.image=true"])
    free, locked = flops(config.model), flops(config.model, Execution(lock=config.lock))
    assert locked.training == pytest.approx(free.training - 2 * free.vision)
    kept = job("model=tiny", "init.weights=here", "lock.image=true")
    assert kept.activations().vision == 0 and memory(kept).total < memory(job("model=tiny")).total
    assert [len(tower) for tower in blocks(config.model)] == [4, config.model.text.layers]


def test_the_least_that_fits() -> None:
    """Checkpointing only where it is needed, and no more than that; more microbatches if nothing else helps."""
    fits = make_plan(
        job("model=vit_l_14", "global_batch_size=4096", *LARGE, "cluster.nodes=1", hardware="h200")
    ).fitting
    assert fits is not None and (fits.strategy, fits.activation_checkpointing, fits.microbatches) == ("ddp", "none", 1)
    tight = job("model=vit_l_14", "global_batch_size=3200", *LARGE, "cluster.nodes=1", hardware="h100")
    least = make_plan(tight).fitting
    assert least is not None and least.activation_checkpointing not in ("none", "full")
    assert least.memory.total <= tight.hardware.usable_bytes
    small = make_plan(job("model=vit_bigg_14", "global_batch_size=65536", *LARGE, "cluster.nodes=1", hardware="a100"))
    assert not small.fits and small.fitting is not None and small.fitting.microbatches > 1
    assert small.fitting.strategy == "fsdp"
    alone = make_plan(job("model=vit_bigg_14", "global_batch_size=64", "cluster=gpu1", hardware="l4"))
    assert alone.fitting is None and not alone.fits


def test_time_and_its_parts() -> None:
    """Twice the GPUs on the same batch take less than twice as little; what is slower takes longer."""
    base = ["model=vit_l_14", "global_batch_size=65536", *LARGE]
    times = {nodes: speed(job(*base, f"cluster.nodes={nodes}", hardware="h200")).step_s for nodes in (8, 16)}
    assert 1 < times[8] / times[16] <= 2
    one = job(*base, "cluster.nodes=8", hardware="h200")
    assert speed(job(*base, "cluster.nodes=8", hardware="a100")).step_s > speed(one).step_s
    full = job(*base, "cluster.nodes=8", "parallel.activation_checkpointing=full", hardware="h200")
    assert 1.1 < speed(full).compute_s / speed(one).compute_s < 1.34 and full.executed > one.executed
    found = make_plan(one, price=2.0, data_samples=10**6)
    assert found.cost == pytest.approx(2 * found.gpu_hours) and found.epochs == one.config.total_samples / 1e6
    assert found.gpu_hours == pytest.approx(one.steps * found.speed.step_s / 3600 * 64)
    parts = found.speed
    assert parts.step_s == parts.compute_s + parts.loss_s + parts.communication_s + parts.data_s
    waiting = ["model=vit_b_32", "data=shards", "data.train.shards=a.tar", "data.workers=1", "cluster=node8"]
    starved = speed(job(*waiting, "precision=amp_bf16", "global_batch_size=4096", hardware="h200"))
    assert starved.data_s > 0.5 * starved.step_s


def test_a_calibrated_plan_takes_what_was_measured() -> None:
    this = job("model=tiny", "data=synthetic")
    per_flop = 1e-11
    found = Calibration(128, 1, 0.01, per_flop, 1e-11)
    assert speed(this, found).compute_s == pytest.approx(0.01 + per_flop * this.executed * 128)
    two = job("model=tiny", "data=synthetic", "cluster=cpu2")
    linked = Calibration(64, 2, 0.01, per_flop, 1e-11, bandwidth=1e9, hop_s=1e-3)
    sent = 4 * two.trained
    assert speed(two, linked).communication_s == pytest.approx(sent / 1e9, rel=0.2)
    assert make_plan(two, linked).range != make_plan(two).range
    assert "calibrated by steps of 64 pairs" in show.sureness(make_plan(two, linked))


def test_it_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from clipscale.planner.command import Options, plan; "
        "plan(['experiment=datacomp_xlarge', 'cluster=slurm'], Options('h200', price=2.0)); "
        "sys.exit(bool({'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "427,616,513" in done.stdout and "least that fits" in done.stdout and "cost" in done.stdout


def test_json_is_raw_numbers() -> None:
    found = json.loads(run("model=vit_b_32 cluster=node8 data=synthetic --hardware h200 --json --price 3").stdout)
    assert found["parameters"]["total"] == 151277313 == found["parameters"]["vision"] + found["parameters"]["text"] + 1
    assert found["flops_per_sample"] == pytest.approx(44.33e9, rel=1e-3)
    sizes = found["memory_bytes"]
    assert all(type(size) is int for size in sizes.values()) and sizes["total"] == sum(sizes.values()) - sizes["total"]
    assert found["step_time_s"] > 0 and found["samples_per_s"] == pytest.approx(128 / found["step_time_s"])
    assert found["cost"] == pytest.approx(3 * found["gpu_hours"])
    assert json.loads(run("--json").stdout)["cost"] is None


def test_sweeps_are_tables_and_pictures(tmp_path: Path) -> None:
    assert _variants(["a=1,2", "b=x"]) == [("a=1", "b=x"), ("a=2", "b=x")] and _variants([]) == [()]
    done = run(
        f"model=vit_l_14 --hardware h100 --sweep cluster=node8,slurm --sweep parallel=ddp,fsdp --plot {tmp_path}/p.png"
    )
    assert done.exit_code == 0 and done.stdout.count("cluster=slurm") == 2
    assert Image.open(tmp_path / "p.png").size[0] > 800
    rows = json.loads(run("--hardware h100 --sweep cluster.nodes=1,2 cluster=slurm --json").stdout)
    assert [row["processes"] for row in rows] == [8, 16] and rows[1]["overrides"] == ["cluster.nodes=2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hardware h900", "--hardware h900: not in the catalogue; choose from"),
        ("--efficiency 2", r"--efficiency 2 must lie in \(0, 1\]"),
        ("--tokens 100", "--tokens 100 must lie between 3 and model.context_length=32"),
        ("--sweep cluster.nodes", "--sweep cluster.nodes: give KEY=VALUE"),
        ("--measure --hardware cpu", "--measure times this machine"),
        ("optim.lrr=3", "optim.lrr: no such key; did you mean optim.lr"),
        ("model.vision.timm=resnet18", "timm=resnet18: what it costs is not known"),
        ("precision=bf16", "precision.name=bf16 computes in bf16 over fp32 shards"),
    ],
)
def test_mistakes_are_one_line(arguments: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(arguments)


def test_devices_are_found_by_their_own_names() -> None:
    assert find("NVIDIA H200").name == "h200" and find("NVIDIA GH200 480GB").name == "gh200"
    assert find("NVIDIA A100-SXM4-80GB").name == "a100" and find("NVIDIA A10").name == "a10"
    assert find("AMD Instinct MI300X OAM").name == "mi300x" and find("NVIDIA L40S").name == "l40s"
    for one in CATALOGUE.values():
        assert one.source and 0 < one.attained <= 1 and one.peak["bf16"] > 0
        assert not one.is_gpu or one.usable_bytes < one.memory_bytes
    assert find("cpu", 2).memory_bytes == pytest.approx(find("cpu").memory_bytes / 2, rel=0.01)


def test_the_catalogue_in_the_documents_is_this_one() -> None:
    assert render() in (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


def test_spares_are_told() -> None:
    found = job("cluster.processes_per_node=7", "global_batch_size=128", "data=synthetic")
    assert (found.world, found.asked, found.pairs) == (4, 7, 32)
    assert "3 more idle" in dict(show.lines(make_plan(found)))["processes"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_are_measured_here(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By new processes: what they find is used, and told."""
    monkeypatch.setattr(measure, "STEPS_S", 0.01)  # no more rounds than must be
    overrides = ["data=synthetic", f"cluster.processes_per_node={processes}", "device=cpu", "global_batch_size=16"]
    (found,) = plan([*overrides, "model.vision.layers=1", "model.text.layers=1"], Options(measure=True))
    calibration = found.calibration
    assert calibration is not None and (calibration.pairs, calibration.processes) == (16 // processes, processes)
    assert (calibration.bandwidth is not None) == (processes > 1)
    assert found.speed.step_s > 0 and found.as_json()["measured"]


def test_what_cannot_be_measured_is_said() -> None:
    classify = ["data=shards", "data.train.shards=a.tar", "loss=cross_entropy", "data.label_key=cls"]
    with pytest.raises(ConfigError, match="cross_entropy takes its classes from data"):
        plan([*classify, "data.zeroshot.classes=c.json", "init.head=zeros"], Options(measure=True))
    with pytest.raises(ClipscaleError, match="a process that measured failed: TypeError"):
        together(1, int)  # which takes no rank and no barrier
