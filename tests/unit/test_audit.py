"""An audit counts right, says how sure it is, and does not make much of little."""

from __future__ import annotations

import json
import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from clipscale.apps.audit.captions import count_words
from clipscale.apps.audit.card import audit_section
from clipscale.apps.audit.command import Options, audit, gap_in_words
from clipscale.apps.audit.groups import parse_group, read_labels, read_words
from clipscale.checkpoint.export import write_safetensors
from clipscale.cli import app
from clipscale.config import compose
from clipscale.data.collections import open_collection
from clipscale.data.samples import Member
from clipscale.errors import ClipscaleError
from clipscale.evals.audit import associate, rates
from clipscale.evals.bootstrap import wilson
from clipscale.models import build_model
from tests.peers import scramble
from tests.shards import sample, write_shard

ROOT = Path(__file__).parents[2]


def test_rates_and_their_intervals() -> None:
    """The bootstrap of a share has the spread of a binomial: sqrt(p (1 - p) / n)."""
    true = [place % 4 == 0 for place in range(400)]
    found = rates(true, ["a"] * 400, [str(place) for place in range(400)], 30).groups["a"]
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (found.rate, found.images, found.units, found.small) == (0.25, 400, 400, False)
    assert found.low == pytest.approx(0.25 - half, abs=0.01) and found.high == pytest.approx(0.25 + half, abs=0.01)


def test_images_that_belong_together_count_as_one() -> None:
    """Ten copies of each image make nothing surer."""
    true = [place % 4 == 0 for place in range(40)]
    alone = rates(true, ["a"] * 40, [str(place) for place in range(40)], 30).groups["a"]
    copied = rates(true * 10, ["a"] * 400, [str(place % 40) for place in range(400)], 30).groups["a"]
    assert copied.units == 40 and (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


def test_where_all_agree_the_interval_is_no_point() -> None:
    found = rates([True] * 10, ["a"] * 10, [str(place) for place in range(10)], 30).groups["a"]
    assert found.small and (found.low, found.high) == wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)


def test_where_all_units_are_alike_the_interval_is_no_point() -> None:
    """One person with a right picture and a wrong one says next to nothing of others."""
    alone = rates([True, False], ["a", "a"], ["she", "she"], 30).groups["a"]
    assert alone.units == 1 and (alone.low, alone.high) == wilson(0.5, 1)
    assert alone.high - alone.low > 0.8
    ten = rates([True, False] * 10, ["a"] * 20, [n // 2 for n in range(20)], 30).groups["a"]
    assert ten.units == 10 and (ten.low, ten.high) == wilson(0.5, 10)


def test_a_gap_is_held_against_chance() -> None:
    random = np.random.default_rng(0)
    groups = [("a", "b", "c")[place % 3] for place in range(600)]
    units = [str(place) for place in range(600)]
    alike = rates((random.random(600) < 0.5).tolist(), groups, units, 30)
    unlike = rates([random.random() < (0.7 if group == "c" else 0.4) for group in groups], groups, units, 30)
    assert alike.p is not None and alike.p > 0.05 and "no more than chance may give" in gap_in_words(vars(alike))
    assert unlike.p is not None and unlike.p < 0.01 and unlike.highest == "c"
    assert unlike.gap == pytest.approx(unlike.groups["c"].rate - unlike.groups[str(unlike.lowest)].rate)


def test_small_groups_are_in_no_gap() -> None:
    groups = ["a"] * 50 + ["b"] * 50 + ["few"] * 3
    found = rates([True] * 50 + [False, True] * 25 + [False] * 3, groups, [str(n) for n in range(103)], 30)
    assert found.groups["few"].small and (found.lowest, found.highest) == ("b", "a") and found.gap == 0.5
    alone = rates([True] * 53, ["a"] * 50 + ["few"] * 3, [str(n) for n in range(53)], 30)
    assert alone.gap is None and "fewer than two groups" in gap_in_words(vars(alone))


def test_associations_are_odds_ratios() -> None:
    group = np.array([True] * 100 + [False] * 100 + [True] * 10)
    other = np.array([False] * 100 + [True] * 100 + [True] * 10)
    has = np.array([True] * 40 + [False] * 60 + [True] * 10 + [False] * 90 + [True] * 10)
    found = associate(group, has, other, np.ones(210, np.int64))
    assert (found.both, found.named) == (40, 100), "captions that name both are left out"
    assert found.log_odds == pytest.approx(math.log((40.5 / 60.5) / (10.5 / 90.5)))
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * (1 / 40.5 + 1 / 60.5 + 1 / 10.5 + 1 / 90.5) ** 0.5, rel=1e-4
    )
    assert found.pmi == pytest.approx(math.log2(40 * 210 / (100 * 60)))
    assert associate(other, ~has & group, group, np.ones(210, np.int64)).pmi is None
    kinds, count = np.unique(np.stack([group, has, other]), axis=1, return_counts=True)
    assert associate(*kinds, count) == found, "captions of a kind may be counted together"


def member(**fields: object) -> Member:
    return Member("shard.tar/k1", {"json": json.dumps(fields).encode(), "txt": b"a"})


def test_groups_come_from_fields_patterns_and_tables(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("key,group\nk1,first\nother,second\n")
    name, of = parse_group("sex=json:sex")
    assert (name, of(member(sex="f")), of(member()), of(member(sex=None))) == ("sex", "f", None, None)
    _, of = parse_group(r"tone=json:name~: ([a-z-]+) skin tone$")
    assert of(member(name="ear: medium-dark skin tone")) == "medium-dark" and of(member(name="ear")) is None
    _, of = parse_group(f"mine={tmp_path / 'groups.csv'}")
    assert of(member()) == "first" and of(Member("k2", {})) is None
    assert of(Member("shard.tar/dir/other", {})) == "second", "the last part of a key"
    (tmp_path / "deep.csv").write_text("key,group\ndir/k1,first\n")
    _, of = parse_group(f"mine={tmp_path / 'deep.csv'}")
    assert of(Member("shard.tar/dir/k1", {})) == "first", "a key holds slashes of its own"


def test_a_blank_is_no_group() -> None:
    """Neither spaces nor what a pattern finds of no length; half a surrogate pair could be written to no page."""
    _, of = parse_group("sex=json:sex")
    assert of(member(sex="  ")) is None and of(member(sex="\ud800x")) == "?x"
    _, of = parse_group("sex=json:name~^([a-z]*)")
    assert of(member(name="A b")) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tone", "write NAME=FIELD"),
        ("tone=json:name~(", "is no regular expression"),
        ("tone=json:name~dark", "into parentheses"),
        ("tone=absent.csv", "cannot be read"),
        ("tone=WIDE.csv", "every row needs two columns"),
        ("tone=BARE.csv", "must be the heading key,group, and is 000,dark"),
        ("tone=TWICE.csv", "000 is in two groups, 'dark' and 'light'"),
    ],
)
def test_wrong_groups_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "WIDE.csv").write_text("key,group,more\n1,2,3\n")
    (tmp_path / "BARE.csv").write_text("000,dark\n001,light\n")
    (tmp_path / "TWICE.csv").write_text("key,group\n000,dark\n000,light\n")
    with pytest.raises(ClipscaleError, match=message):
        parse_group(re.sub("[A-Z]+.csv", lambda name: str(tmp_path / name[0]), text))


@pytest.mark.parametrize(
    "content", ["", "sets: 5", "sets: {a: [one]}", "sets: {a: [b, c], d: [c]}", "{", "templates: x"]
)
def test_wrong_label_files_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.yaml").write_text(content)
    with pytest.raises(ClipscaleError, match=r"--labels .*labels\.yaml"):
        read_labels(tmp_path / "labels.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("groups: {a: [x], b: [y], c: z}\nattributes: {d: [w]}", "c needs a list"),
        ("groups: {a: [x], b: []}\nattributes: {d: [w]}", "b needs a list"),
        ("groups: {a: [x], b: [no]}\nattributes: {d: [w]}", "b holds False, which is no word; put it in quotes"),
        ("groups: {a: [x], b: [y]}\nattributes: {d: [' ']}", "d holds ' '"),
        ("groups: {a: [x], b: [y, ]}\nattributes: {d: [~]}", "d holds None"),
    ],
)
def test_no_word_is_left_out_in_silence(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text(content)
    with pytest.raises(ClipscaleError, match=rf"--words .*words\.yaml: {message}"):
        read_words(tmp_path / "words.yaml")


def test_words_are_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text(
        "groups: {light: [light skin tone], man: [man, men]}\nattributes: {x: [red hat]}"
    )
    words = read_words(tmp_path / "words.yaml")
    light, man = words.groups["light"], words.groups["man"]
    assert light.search("ear: Light  skin tone") and not light.search("ear: medium-light skin tone")
    assert man.search("two men.") and not man.search("a woman and a mannequin")


WORDS = "groups: {red: [red], green: [green]}\nattributes: {round: [round], tall: [tall]}"
LABELS = "templates: ['a {} thing']\nsets: {colours: [red, green, blue], shapes: [round, square, <b>tall</b>]}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a shard of 60 samples of which one is bad, and the files that an audit takes."""
    out = tmp_path_factory.mktemp("audit")
    config = compose(["model=tiny"])[0]
    model = build_model(config.model).eval()
    scramble(model)
    (out / "model").mkdir()
    write_safetensors(model, config, out / "model")
    members = [(f"{n:03d}", sample(n)) for n in range(60)]
    members[7] = ("007", {"jpg": b"no image", "txt": b"a red thing"})
    write_shard(out / "00000.tar", members)
    (out / "words.yaml").write_text(WORDS)
    (out / "labels.yaml").write_text(LABELS)
    return out


class Page(HTMLParser):
    """Whether tags are closed in order, and what a browser would have to fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag not in ("meta", "line", "circle", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle"):
            assert self.open.pop() == tag


def test_the_command_tells_all_of_it(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(
        ["parity=json:name~([02468])$", "label=json:label"], place / "labels.yaml", str(place / "00000.tar"),
        place / "words.yaml", small=10, batch_size=16,
    )  # fmt: skip
    audit(str(place / "model"), str(place / "00000.tar"), options, tmp_path / "audit.html", "cpu", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["unusable"], found["units"]) == (59, 1, 59)
    assert found["groups"]["parity"] == {"0": 6, "2": 6, "4": 6, "6": 6, "8": 6}
    assert all(rate["small"] for rate in found["accuracy"]["by"]["parity"]["groups"].values())
    shares = [of["overall"]["rate"] for of in found["labels"]["sets"].values()]
    assert sum(shares) == pytest.approx(1), "each image gets one label"
    assert found["captions"]["samples"] == 60 and set(found["captions"]["associations"]) == {"red", "green"}
    (tmp_path / "audit.json").write_text(json.dumps(found))
    for group, row in found["captions"]["associations"].items():
        for attribute, one in row.items():
            odds = f"{one['log_odds']:+.2f} [" if one["named"] else ""
            cells = f"| {group} | {attribute} | {one['both']} of {one['named']} | {odds}"
            assert cells.replace("<", "&lt;") in audit_section(tmp_path / "audit.json")
    text = (tmp_path / "audit.html").read_text()
    page = Page(text)
    assert not page.open and not page.fetched and "<b>tall" not in text and "&lt;b&gt;tall" in text
    plain = Options(["parity=json:name~([02468])$"])
    model, shard = str(place / "model"), str(place / "00000.tar")
    with pytest.raises(ClipscaleError, match=r"cannot be written: .* is no directory .*; choose another --out"):
        audit(model, shard, plain, place / "words.yaml" / "x.html", "cpu", as_json=False)
    assert not capsys.readouterr().out, "told before the model is asked"
    with pytest.raises(ClipscaleError, match="cannot be written: File name too long"):
        audit(model, shard, plain, tmp_path / f"{'x' * 300}.html", "cpu", as_json=False)
    told = capsys.readouterr().out
    assert "accuracy, one of" in told and "29 images are of no parity" in told, "numbers outlive a page"


def test_the_page_does_what_it_says(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "auditing.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs", "emoji").symlink_to(place / "model")
    names = ["woman golfing: light skin tone", "man farmer: medium-dark skin tone", "girl, pilot", "ear"]
    members = [
        sample(n) | {"json": json.dumps({"name": names[n % 4]}).encode(), "txt": names[n % 4].encode()}
        for n in range(12)
    ]
    for shard in ("emoji-val-000000.tar", *(f"emoji-train-{n:06d}.tar" for n in range(18))):
        write_shard(Path(shard), [(f"{n:03d}", one) for n, one in enumerate(members)])
    for name, content in zip(
        ("labels.yaml", "words.yaml"), re.findall(r"```yaml\n(.*?)```", page, re.DOTALL), strict=True
    ):
        Path(name).write_text(content)
    Path("groups.csv").write_text("key,group\n000,first\n001,second\n")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for command in "".join(blocks).replace("\\\n", " ").splitlines():
        words, _, out = command.partition(" > ")
        result = CliRunner().invoke(app, shlex.split(words)[1:])
        assert result.exit_code == 0, result.output
        if out:
            Path(out).write_text(result.stdout)
    assert Path("audit.html").exists()
    card = Path("exported", "README.md").read_text()
    assert "Of model with 12 images" in card, "whose numbers they are: a card may be given those of another model"
    assert "| first* | 1 |" in card and "Labels of" not in card and "No gap is given" in card


def test_captions_are_counted_once_a_sample(place: Path) -> None:
    found = count_words(open_collection(str(place / "00000.tar")), "txt", read_words(place / "words.yaml"))
    texts = [sample(n)["txt"].decode().split() for n in range(60)]
    texts[7] = ["a", "red", "thing"]
    assert found["groups"] == {name: sum(name in text for text in texts) for name in ("red", "green")}


def test_words_are_looked_for_in_one_caption_at_a_time(tmp_path: Path) -> None:
    """A phrase lies in one caption; accents and hyphens may be written in several ways."""
    captions = [["a café in red", "hat of a man"], ["woman in a red  hat"], ["cafe\N{COMBINING ACUTE ACCENT} man"],
                ["a red\N{NON-BREAKING HYPHEN}hat man"], ["MAN, red hat"], []]  # fmt: skip
    members = [(f"{n}", {"json": json.dumps({"captions": each}).encode()}) for n, each in enumerate(captions)]
    write_shard(tmp_path / "captions.tar", members)
    (tmp_path / "words.yaml").write_text(
        "groups: {man: [man], woman: [woman]}\n"
        "attributes: {hat: [red hat, hat, hat], place: [café], bare: [cafe, red hat]}"
    )
    words = read_words(tmp_path / "words.yaml")
    found = count_words(open_collection(str(tmp_path / "captions.tar")), "json:captions", words)
    assert (found["samples"], found["without_caption"]) == (5, 1)
    assert found["groups"] == {"man": 4, "woman": 1}
    assert found["attributes"] == {"hat": 3, "place": 2, "bare": 2}
    one = found["associations"]["man"]["bare"]
    assert (one["both"], one["named"]) == (1, 4) and one["pmi"] == pytest.approx(math.log2(1 * 5 / (4 * 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(["a=json:absent"]), "no image of .* belongs to a group"),
        (Options(["a=json:label"], captions="x"), "--captions and --words go together"),
        (Options(["a=json:label"], answer_key="json:absent"), "can be used, .*no_absent; check --answer-key"),
        (Options(["a=json:label"], unit="json:absent"), "--unit json:absent: no image of .* has it"),
    ],
)
def test_mistakes_are_one_line(options: Options, message: str, place: Path) -> None:
    with pytest.raises(ClipscaleError, match=message):
        audit(str(place / "model"), str(place / "00000.tar"), options, None, "cpu", as_json=True)


def test_where_units_are_missing_an_image_is_its_own(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody's images are neither one person's nor left out."""
    people = ["she", "she", "he", None, None, "", "absent"]
    fields = [{"g": "all"} | ({} if who == "absent" else {"who": who}) for who in people]
    write_shard(
        tmp_path / "p.tar", [(f"{n}", sample(n) | {"json": json.dumps(f).encode()}) for n, f in enumerate(fields)]
    )
    options = Options(["g=json:g"], unit="json:who", small=1)
    found = audit(str(place / "model"), str(tmp_path / "p.tar"), options, None, "cpu", as_json=True)
    assert (found["images"], found["unusable"], found["units"]) == (7, 0, 6)


def test_the_first_caption_of_a_folder_is_the_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(sample(number)["jpg"])
        (tmp_path / f"{number}.txt").write_text(f"a thing\nthing number {number}\n")
    (tmp_path / "groups.csv").write_text("key,group\n0.jpg,a\n1.jpg,b\n")
    options = Options([f"g={tmp_path / 'groups.csv'}"])
    found = audit(str(place / "model"), str(tmp_path), options, None, "cpu", as_json=True)
    assert found["accuracy"]["texts"] == 1 and found["accuracy"]["overall"]["rate"] == 1


def test_labels_outside_the_classes_are_one_line(place: Path, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "test" / "nshards.txt").write_text("1")
    write_shard(tmp_path / "test" / "0.tar", [(f"{n}", sample(n) | {"cls": b"%d" % n}) for n in range(3)])
    with pytest.raises(ClipscaleError, match="run from 0 to 2, and it names 2 classes"):
        audit(str(place / "model"), str(tmp_path), Options(["a=json:label"]), None, "cpu", as_json=True)


def test_damaged_shards_are_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "cut.tar", [(f"{n}", sample(n)) for n in range(9)])
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    cut = str(tmp_path / "cut.tar")
    options = Options(["a=json:label"], captions=cut, words=place / "words.yaml")
    audit(str(place / "model"), cut, options, None, "cpu", as_json=True)
    assert capsys.readouterr().err.count("warning: shard cut.tar") == 2
