"""README, docs/ and the website: links that lead somewhere, tables that agree with the code, figures with words."""

import html
import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from voc_folder import rectangle_mask, smooth_image

from toco_core.backbone import SHIPPED
from toco_core.config import RECIPES, ModelConfig, ReleaseBehaviour, field_sections, tiny
from toco_core.data import open_source
from toco_core.data.layouts import tags
from toco_core.model import skeleton
from toco_core.objective import PAPER, TERMS
from toco_core.predict.export import METHODS

ROOT = Path(__file__).resolve().parents[1]
import build_site  # noqa: E402

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(text: str, head: str) -> list[list[str]]:
    """Cells of the rows below the header row that begins with `head`."""
    lines = text[text.index(f"\n| {head}") + 1 :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert rows
    return rows


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_link_leads_to_a_file_or_a_heading(name):
    text = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if re.match("https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_the_readme_is_short_and_names_all_notebooks_and_their_sources():
    text = page("README.md")
    assert len(text.splitlines()) < 135
    named = re.findall(r"^\| \[(\w+)\]\(notebooks/\1\.ipynb\)", text, re.MULTILINE)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert "arxiv.org/abs/2303.01267" in text and "github.com/rulixiang/ToCo" in text and "--log-output" in text


def test_every_deviation_stands_in_the_table_with_its_default():
    rows = table(page("docs/deviations.md"), "Paper")
    found = {}
    for row in rows:
        name, default = re.fullmatch(r"`(\w+)` \((True|False)\)", row[3]).groups()
        found[name] = default == "True"
        assert row[1].startswith("**") == (default == "False")  # bold: slips
    assert found == {f.name: f.default for f in fields(ReleaseBehaviour)}


def test_fields_and_terms_of_the_methods_page_exist():
    text = page("docs/methods.md")
    known = field_sections()
    rows = table(text, "Term")
    weights = [name for row in rows for name in code(row[2])]
    assert sorted(weights) == sorted(PAPER)
    ideas = text[text.index("## Ideas") :]
    assert all(f"`{name}`" in ideas for name in set(TERMS) - set(PAPER))
    assert not {name for row in rows for name in code(row[3])} - set(known)
    options = text[text.index("## Options") :]
    named = {name for line in re.findall(r"\*\*, (`[^:]+):", options) for name in code(line)}
    assert len(named) >= 8 and not named - set(known)
    assert [row[0] for row in table(text, "Recipe")] == [
        f"`{name}()`" for name in ("tiny", "photographs", "voc", "coco")
    ]
    assert len(RECIPES) == 4


@pytest.mark.slow
def test_every_backbone_of_the_table_can_be_laid_out():
    rows = table(page("docs/backbones.md"), "`backbone`")
    for row in rows:
        (name,), (patch, width, depth) = code(row[0]), (re.findall(r"\d+", row[2]) or ["0"] * 3)
        model = skeleton(ModelConfig(backbone=name, pretrained=False, layer=2), 3)
        shape = tuple(map(str, (*set(model.patch_size), model.width, len(model.encoder.blocks))))
        assert "your own" in row[3] or shape == (patch, width, depth), name
    assert {*SHIPPED, ModelConfig().backbone, tiny().model.backbone} <= {code(row[0])[0] for row in rows}


def test_the_table_of_tags_is_read_as_it_is_described(tmp_path):
    text = page("docs/data.md")
    table_text = re.search(r"```\n(file,tags.*?)```", text, re.DOTALL)[1]
    (tmp_path / "tags.csv").write_text(table_text, encoding="utf-8")
    (tmp_path / "masks").mkdir()
    Image.fromarray(rectangle_mask(20, 31, 2)).save(tmp_path / "masks" / "a.png")
    for i, name in enumerate("ab"):
        Image.fromarray(smooth_image(20, 31, i)).save(tmp_path / f"{name}.jpg")
    train, val = (open_source(tmp_path / "tags.csv", split) for split in ("train", "val"))
    assert train.class_names == ("background", "cat", "dog")
    assert (train.image_labels.tolist(), val.image_labels.tolist()) == ([[1, 1]], [[0, 0]])
    assert (train.mask(0) == 2).any() and val.mask(0) is None
    columns = {code(row[0])[0]: set(code(row[1])) for row in table(text, "Column") if code(row[0])}
    assert {"file", *columns["file"]} == set(tags.FILE_COLUMNS)
    assert {"tags", *columns["tags"]} == {"tags", "labels", "classes"} <= set(tags.TAG_COLUMNS)
    methods = {name: row[1] for row in table(text, "`--method`") for name in code(row[0])}
    assert methods.keys() == METHODS.keys() and methods["crf"] == METHODS["crf"]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_commands_of_one_example_do_not_write_into_each_others_folder(name):
    """`toco export` refuses a folder of `toco label`."""
    for block in re.findall(r"```sh\n(.*?)```", page(name), re.DOTALL):
        exported, labelled = (
            set(re.findall(pattern, block)) for pattern in (r"toco export \S+ (\S+)", r"toco label \S+ \S+ (\S+)")
        )
        assert not exported & labelled


def test_every_experiment_has_its_row():
    text = page("experiments/README.md")
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        assert path.relative_to(ROOT / "experiments").as_posix() in text, path.name
    for path in sorted((ROOT / "experiments" / "records").iterdir()):
        assert f"records/{path.name}" in text, path.name


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What Sphinx reads."""
    folder = tmp_path_factory.mktemp("site") / "source"
    build_site.assemble(folder)
    return folder


def test_every_figure_of_the_notebooks_has_words_and_no_opening_stands_in_the_way(source):
    n = 0
    for path in sorted((source / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert "hide-input" in cells[0].metadata["tags"] and cells[0].source.lstrip().startswith(("import", "from"))
        (parameters,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
        assert "hide-input" not in parameters.metadata["tags"]
        for cell in cells:
            assert "NBVAL" not in cell.source
            folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
            assert folded == ("hide-input" in cell.metadata.get("tags", []))
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                n += 1
                words = cell.metadata["mystnb"]["image"]["alt"]
                assert len(words) > 20 and not re.search(r"[*`$]|\]\(", words)
    assert n > 20


def test_every_page_has_its_place_at_the_side(source):
    text = (source / "index.md").read_text(encoding="utf-8")
    named = re.findall(r"^(\S+)$", "".join(re.findall(r":caption: .*?\n(.*?)```", text, re.DOTALL)), re.MULTILINE)
    pages = {
        path.relative_to(source).with_suffix("").as_posix()
        for path in source.rglob("*.*")
        if path.suffix not in (".py", ".gif")
    }
    pages = {page for page in pages if page.split("/")[0] not in ("static", "api") and page != "notebooks/start.png"}
    assert sorted(named) == sorted(pages - {"index"} | {"api/index"})


def test_pages_of_the_api_hold_every_public_name_with_its_words(source):
    text = (source / "api" / "toco_core.labels.md").read_text(encoding="utf-8")
    assert "{py:function} seed_label(cam: Float[Tensor, 'B K H W'], image_labels" in text
    assert "Raises ToCoError unless 0 \\<= beta_l \\< beta_h \\<= 1." in text
    assert "{py:function} _resize" not in text
    text = (source / "api" / "toco_core.config.model.md").read_text(encoding="utf-8")
    assert "{py:attribute} ModelConfig.layer\n:type: int\n:value: 10\n\nBlock that feeds the auxiliary" in text
    text = (source / "api" / "toco_core.objective.md").read_text(encoding="utf-8")
    assert "{py:property} Step.tokens" in text and "{py:method} Step.made(label:" in text
    assert "- `number`: of the step, from 0." not in text  # the constructor's page is the class's


def test_docstrings_become_markdown():
    text = """Cut `a` where a < b[0]

    A $ block
      of its own

Args:
    first: the one
        and only
    second, third: others

The end."""
    assert build_site.markdown(text) == [
        r"Cut `a` where a \< b\[0\]", "", "    A $ block", "      of its own", "", "", "**Args**", "",
        "- `first`: the one", "  and only", "- `second, third`: others", "  ", "", "The end.",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the tools' own; those of the pages are errors
def test_the_website_builds_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_nb", "sphinx_book_theme"):
        pytest.importorskip(name, reason="the extra `docs` is not installed")
    assert build_site.main([str(tmp_path)]) == 0
    train = (tmp_path / "html" / "notebooks" / "train.html").read_text(encoding="utf-8")
    figures = re.findall(r'<img alt="([^"]*)"', train)
    assert figures and all(len(html.unescape(words)) > 20 for words in figures)
    assert "block that feeds the auxiliary classifier, from 1" in train  # the help of a parameter is not cut
    for path in (tmp_path / "html").glob("**/*.html"):  # equations that were not read as such
        prose = re.sub(r"<(pre|code|script|svg)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert "$" not in prose, path.name
    assert 'id="toco_core.labels.seed_label"' in (tmp_path / "html" / "api" / "toco_core.labels.html").read_text()
    assert "Change things" in (tmp_path / "html" / "index.html").read_text()
