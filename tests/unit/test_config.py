"""Composition: every option works, every mistake is one line that names the key."""

from __future__ import annotations

import ast
import enum
import inspect
import itertools
import re
from pathlib import Path

import pytest

from clipscale.config import compose, config_dir, load_config, load_group, save_config, validate
from clipscale.config.fields import Resume, leaves
from clipscale.config.model import Model
from clipscale.config.optim import LossName, PrecisionName, ScheduleName
from clipscale.config.resume import differences, identity
from clipscale.config.rundir import log_event, open_run
from clipscale.config.running import Strategy
from clipscale.config.schema import Config
from clipscale.config.validate import default_streams, usable_processes
from clipscale.errors import ConfigError
from clipscale.losses import LOSSES
from clipscale.optim import SCHEDULES
from clipscale.parallel import PRECISIONS, STRATEGIES

OPTIONS = sorted(
    f"{file.parent.name}={file.stem}" for file in config_dir().glob("*/*.yaml") if file.parent.name != "experiment"
)
NEEDED = {"clipa_l_16_finetune": ["init.weights=runs/clipa_l_16"]}
EXPERIMENTS = sorted(file.stem for file in (config_dir() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str) -> None:
    config, _ = compose([option])
    group, name = option.split("=")
    if group == "model":
        assert config.model.name == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_is_valid(name: str) -> None:
    config, experiment = compose([f"experiment={name}", *NEEDED.get(name, [])])
    assert experiment == name
    validate(config)
    header = (config_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert header[0] == "# @package _global_"
    assert any("clipscale train" in line or "launch/" in line for line in header if line.startswith("#"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=3", "optim.lrr: no such key; did you mean optim.lr?"),
        ("modle=tiny", "modle: no such key; did you mean model?"),
        ("data.train.shard=x", "data.train.shard: no such key; did you mean data.train.shards?"),
        ("model=vit_b32", "model=vit_b32: no such option; did you mean vit_b_32?"),
        ("experiment=emojis", "experiment=emojis: no such option; did you mean emoji?"),
        ("optim.lr=abc", "optim.lr: Value 'abc' of type 'str' could not be converted to Float"),
        ("global_batch_size=12.5", "global_batch_size: Value '12.5'"),
        ("loss.name=foo", "loss.name: Invalid value 'foo', expected one of [clip, siglip, cross_entropy]"),
        ("+foo=3", "foo: no such key"),
        ("+optim.lrx=3", "optim.lrx: no such key; did you mean optim.lr?"),
        ("a b", "a b"),
    ],
)
def test_mistakes_are_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_in_a_users_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lrr: 3\n")
    with pytest.raises(
        ConfigError, match=r"optim\.lrr: no such key; did you mean optim\.lr\? \(in experiment/mine\.yaml\)"
    ):
        compose(["experiment=mine"], user_dir=str(tmp_path))


def test_a_users_own_tree_is_searched(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: vit_b_16\noptim:\n  lr: 0.125\n"
    )
    config, experiment = compose(["experiment=mine"], user_dir=str(tmp_path))
    assert (experiment, config.model.name, config.optim.lr) == ("mine", "vit_b_16", 0.125)


def test_brace_patterns_need_no_quotes() -> None:
    config, _ = compose(["data=shards", "data.train.shards=/d/{000..003}.tar::/e/{0..1}.tar"])
    assert config.data.train.shards == "/d/{000..003}.tar::/e/{0..1}.tar"
    config, _ = compose(["data=shards", "data.train.shards=[/d/1.tar,/d/2.tar]"])
    assert config.data.train.shards == ["/d/1.tar", "/d/2.tar"]
    for off in ("null", "0"):
        config, _ = compose([f"data.val.shards={off}"])
        assert not config.data.val.shards


def test_classes_are_recorded_not_typed(tmp_path: Path) -> None:
    for loss in ("clip", "cross_entropy"):
        with pytest.raises(ConfigError, match=r"leave model\.classes out") as caught:
            open_run(*compose([f"loss={loss}", "model.classes=[cat,dog]", f"runs_dir={tmp_path}"]), [])
        assert "\n" not in str(caught.value)


TIMM = "init.weights=timm:vit_base_patch16_224"
HF_TEXT = ["model.text.hf=a/b", "tokenizer.name=hf:a/b", "lock.text=true"]
DROPS = ["init.weights=x", "lock.image=true", "model.vision.patch_dropout=0.5"]
PROBE = [
    "data=shards", "data.train.shards=a.tar", "loss=cross_entropy", "data.label_key=cls",
    "data.zeroshot.classes=c.json", "init.weights=x", "lock.image=true",
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (HF_TEXT, None),
        ([*HF_TEXT, TIMM], None),
        ([*HF_TEXT, "model.text.hf_pretrained=false"], "lock.text=true locks weights that nothing has trained"),
        ([*HF_TEXT, "model.text.hf_pretrained=false", "init.weights=x"], None),
        ([TIMM, "lock.text=true"], "lock.text=true locks weights that nothing has trained"),
        ([TIMM, "lock.image=true"], None),
        (["lock.image=true"], "lock.image=true locks weights that nothing has trained"),
        (["init.weights=x", "lock.text=true", "lock.image=true"], "nothing is left to train"),
        (DROPS, "patch_dropout=0.5 has no effect in a locked image tower"),
        ([*DROPS, "lock.image_unlocked_groups=1"], "patch_dropout=0.5 has no effect in a locked image tower"),
        ([*DROPS, "lock.image_unlocked_groups=1", "model.vision.proj=none"], None),
        ([*DROPS, "lock.image_unlocked_groups=2"], None),
        (PROBE, None),
        ([*PROBE, "lock.text=true"], "lock.text=true has no effect"),
        (["experiment=clipa_l_16_finetune"], "init.weights is to be given: init.weights=RUN"),
        (["model.classes=[cat,dog]"], "model.classes has no effect without loss=cross_entropy"),
    ],
    ids=str,
)
def test_what_starts_and_is_locked(overrides: list[str], message: str | None) -> None:
    config, _ = compose(overrides)
    if message is None:
        validate(config)
        return
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_all_cross_field_mistakes_come_at_once() -> None:
    config, _ = compose(["optim.lr=-1", "data.streams=3", "data.crop_scale=[2,3]", "ema.decay=2"])
    with pytest.raises(ConfigError) as caught:
        validate(config)
    text = str(caught.value)
    assert text.startswith("4 mistakes:")
    for part in ("optim.lr=-1", "data.streams=3 does not divide", "data.crop_scale", "ema.decay=2.0"):
        assert part in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.streams=7"], "use data.streams="),
        (["data=shards"], "data.train.shards is empty"),
        (["data=shards", "data.train.shards=[]"], "data.train.shards is empty"),
        (["tokenizer.context_length=99"], "model.context_length=99"),
        (["schedule.warmup_samples=99999999"], "schedule.warmup_samples"),
        (["parallel.activation_checkpointing=some"], "choose none, selective, full or a number of blocks"),
        (["parallel.activation_checkpointing=0"], "choose none, selective, full or a number of blocks"),
        (["parallel.activation_checkpointing=true"], "choose none, selective, full or a number of blocks"),
        (["parallel=fsdp", "parallel.shard_size=1"], "no effect without parallel.strategy=hsdp"),
        (["parallel=hsdp", "cluster.processes_per_node=8", "parallel.shard_size=3"], "does not divide the 8 processes"),
        (["parallel=hsdp", "parallel.shard_size=0"], "parallel.shard_size=0 does not divide"),
        (["precision=bf16"], "use precision=amp_bf16, or parallel=fsdp or hsdp"),
        (["parallel.cpu_offload=true"], "no shards to keep on the host; use parallel=fsdp or hsdp"),
        (["parallel=fsdp", "parallel.cpu_offload=true", "precision=amp_fp16"], "use precision=amp_bf16"),
        (["parallel=hsdp", "parallel.bf16_reduce=true"], "reduces in fp32"),
        (["data.zeroshot.classes=null"], "data.zeroshot.classes"),
        (["model.text.heads=3"], "model.text.heads"),
        (["data.workers=-1"], "data.workers"),
        (["data.max_bad_fraction=1.5"], "data.max_bad_fraction=1.5 must lie"),
        (["model.mean=[0.5]"], "three numbers each"),
        (["model.std=[0,0,0]"], "std above 0"),
        (["model=rn50", "model.vision.patch_dropout=0.5"], "model.vision.timm=resnet50_clip is no ViT"),
        (["model.text.pad_id=49408"], "model.text.pad_id=49408 is no token"),
        (["model.text.norm_eps=0"], "model.text.norm_eps=0"),
        (["model.embed_dim=0"], "model.embed_dim=0 must be above 0"),
        (["model.vision.patch_size=0"], "model.vision.patch_size=0 must be above 0"),
        (["model.vision.drop_path=1.5"], "model.vision.drop_path"),
        (["model.vision.patch_dropout=1.0"], "model.vision.patch_dropout"),
        (["schedule.min_lr_ratio=-1"], "schedule.min_lr_ratio"),
        (["schedule.warmup_samples=-5"], "must be 0 or more"),
        (["optim.eps=-1"], "optim.eps"),
        (["seed=99999999999999999999"], "seed=99999999999999999999 must lie"),
        (["name=''"], "is no name"),
        (["data.negatives_per_sample=0"], "data.negatives_per_sample=0 must be 1 or more"),
        (["data.negatives_key=json:captions"], "data.negatives_key=json:captions is not where"),
        (["data=synthetic", "data.negatives_key=txt2"], "data=synthetic has no negatives"),
        (["optim.microbatches=0"], "optim.microbatches=0: choose auto or a number"),
        (["optim.microbatches=2.5"], "optim.microbatches=2.5: choose"),
        (["optim.microbatches=true"], "optim.microbatches=True: choose"),
        (["optim.microbatches=null"], "optim.microbatches=None: choose"),
        (["optim.microbatches=auto"], "needs the pairs that a process can hold at once, e.g. optim.max_microbatch="),
        (["optim.max_microbatch=8"], "optim.max_microbatch=8 has no effect without optim.microbatches=auto"),
        (["loss.teacher_weight=0.9"], "loss.teacher_weight=0.9 has no effect without loss.teachers"),
        (["loss.teachers=run"], "loss.teachers=run must be a list; write"),
        (["loss.teachers=[{image: a, text: b, logit_scale: .inf}]"], "names the members of a teacher's"),
        (["loss.teachers=[a]", "loss=siglip"], "only loss=clip has a softmax to distil into"),
        (["loss.cache_mb=nan"], "loss.cache_mb=nan must be 0 or more"),
        (["optim.microbatches=auto", "optim.max_microbatch=0"], "optim.max_microbatch=0 must be above 0"),
    ],
)
def test_cross_field_mistakes(overrides: list[str], message: str) -> None:
    config, _ = compose(overrides)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "pairs", "count"),
    [
        ([], 256, 1),
        (["optim.microbatches=4"], 256, 4),
        (["optim.microbatches=auto", "optim.max_microbatch=64"], 256, 4),
        (["optim.microbatches=auto", "optim.max_microbatch=64"], 257, 5),
        (["optim.microbatches=auto", "optim.max_microbatch=64"], 64, 1),
        (["optim.microbatches=auto", "optim.max_microbatch=1000"], 256, 1),
        (["optim.microbatches=auto", "optim.max_microbatch=1"], 7, 7),
    ],
)
def test_microbatches_are_as_few_as_fit(overrides: list[str], pairs: int, count: int) -> None:
    config, _ = compose(overrides)
    validate(config)
    assert config.optim.count_microbatches(pairs) == count


def test_more_microbatches_than_pairs_are_refused() -> None:
    config, _ = compose(["optim.microbatches=5"])
    assert config.optim.count_microbatches(5) == 5
    with pytest.raises(ConfigError, match=r"=5 is more than the 4 pairs .* use optim\.microbatches=4"):
        config.optim.count_microbatches(4)


def test_every_field_is_documented_and_marked() -> None:
    for key, field, holder in leaves(Config):
        assert isinstance(field.metadata.get("resume"), Resume), key
        body = ast.parse(inspect.getsource(holder)).body[0].body  # type: ignore[attr-defined]
        documented = {
            one.target.id  # type: ignore[attr-defined]
            for one, after in itertools.pairwise(body)
            if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr)
        }
        assert field.name in documented, key


@pytest.mark.parametrize(
    ("options", "registry"),
    [(LossName, LOSSES), (ScheduleName, SCHEDULES), (PrecisionName, PRECISIONS), (Strategy, STRATEGIES)],
)
def test_options_match_registries(options: type[enum.Enum], registry: dict[str, object]) -> None:
    assert {option.value for option in options} == set(registry)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config, _ = compose(["experiment=emoji", "ema.decay=0.99", "loss.teachers=[{image: a.i.npy, text: a.t.npy}]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_load_group_suggests() -> None:
    assert load_group("model", "vit_l_14", Model).embed_dim == 768
    with pytest.raises(ConfigError, match="did you mean vit_l_14"):
        load_group("model", "vit_l14", Model)


def test_identity_follows_what_matters() -> None:
    base, _ = compose([])
    same, _ = compose(["cluster=cpu2", "data.workers=7", "runs_dir=/elsewhere", "total_samples=9999999"])
    other, _ = compose(["optim.lr=0.01"])
    assert identity(base) == identity(same) != identity(other)


def test_identity_ignores_where_the_data_lies() -> None:
    here, _ = compose(["data=shards", "data.train.shards=/here/{0..3}.tar"])
    there, _ = compose(["data=shards", "data.train.shards=/there/{0..3}.tar"])
    assert identity(here) == identity(there)
    assert not differences(here, there)[Resume.fixed]


def test_open_run_joins_refuses_and_records(tmp_path: Path) -> None:
    where = [f"runs_dir={tmp_path}", "name=r"]
    run = open_run(*compose(where), where)
    assert run.config.data.streams == 128
    assert open_run(*compose([*where, "seed=1"]), where).changes == {}, "a run that never began is corrected freely"
    run = open_run(*compose(where), where)
    log_event(run.path, "started")
    assert (run.path / "overrides.txt").read_text().splitlines() == where
    again = open_run(*compose([*where, "optim.lr=0.5", "cluster=cpu2"]), where)
    assert again.changes == {"optim.lr": (1e-3, 0.5)}
    assert "config_changed" in (run.path / "events.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"another configuration(.|\n)*seed: 0 in the run, 5 now"):
        open_run(*compose([*where, "seed=5"]), where)
    with pytest.raises(ConfigError, match="is less than"):
        open_run(*compose([*where, "total_samples=9000"]), where)


def test_open_run_keeps_the_recorded_streams(tmp_path: Path) -> None:
    where = [f"runs_dir={tmp_path}", "name=r"]
    log_event(open_run(*compose([*where, "global_batch_size=64"]), where).path, "started")
    joined = open_run(*compose([*where, "global_batch_size=128"]), where)
    assert joined.config.data.streams == 64
    with pytest.raises(ConfigError, match=r"data\.streams=64 does not divide global_batch_size=96"):
        open_run(*compose([*where, "global_batch_size=96"]), where)


def test_an_unwritable_run_dir_is_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        open_run(*compose([f"runs_dir={blocker}/runs"]), [])


@pytest.mark.parametrize(
    ("streams", "world", "usable"), [(256, 1, 1), (256, 3, 2), (256, 8, 8), (255, 2, 1), (12, 5, 4), (4, 100, 4)]
)
def test_streams_are_shared_evenly(streams: int, world: int, usable: int) -> None:
    assert usable_processes(streams, world) == usable


@pytest.mark.parametrize(
    ("batch", "world", "streams"),
    [(256, 1, 256), (12_288, 1, 512), (12_288, 6, 384), (32_768, 1024, 1024), (255, 2, 255)],
)
def test_streams_suit_the_processes_that_begin(batch: int, world: int, streams: int) -> None:
    assert default_streams(batch, world) == streams
