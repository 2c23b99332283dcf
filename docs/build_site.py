"""Build the website: the pages of this folder, the committed notebooks, the docstrings.

    pip install -e ".[docs]" -c constraints.txt
    python docs/build_site.py FOLDER            # then open FOLDER/html/index.html

No notebook is executed and no module is imported: figures are those that are committed, the API pages are read from the
sources. Equations are drawn by MathJax, which the browser fetches. Any warning is an error. FOLDER/source holds what
Sphinx reads; it is made anew each time.
"""

import argparse
import ast
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import nbformat

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
GUIDES = ("install", "data", "backbones", "howto", "scale", "tools")
BACKGROUND = ("methods", "deviations", "results", "glossary", "trust", "versions")
"""Pages in their order at the side; a page that stands in neither list comes behind the guides."""
LINK = re.compile(r"(?P<code>`[^`]*`)|(?P<open>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s]+)\)")
CONF = """
project = "toco_core"
author = "The toco_core maintainers"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "image/png", 0), ("html", "image/svg+xml", 1)]
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]  # two classes may have one name
html_theme = "sphinx_book_theme"
html_title = "toco_core"
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "navbar_persistent": [], "collapse_navbar": True}
toc_object_entries_show_parents = "hide"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
python_maximum_signature_line_length = 88
"""
CSS = """\
div.cell_input pre, div.highlight-sh pre { white-space: pre-wrap; }
table { display: block; overflow-x: auto; }
"""


def site_pages() -> dict[str, str]:
    """Path in the repository -> path in the site, of every page."""
    pages = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "experiments/README.md": "experiments.md"}
    pages |= {f"docs/{path.name}": path.name for path in sorted(DOCS.glob("*.md"))}
    return pages | {f"notebooks/{path.name}": f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}


def assemble(source: Path) -> None:
    """Write what Sphinx reads. Raises ValueError for a link to nothing."""
    pages = site_pages()
    shutil.rmtree(source, ignore_errors=True)
    (source / "static").mkdir(parents=True)
    (source / "static" / "site.css").write_text(CSS, encoding="utf-8")
    (source / "conf.py").write_text(CONF, encoding="utf-8")
    for origin, page in pages.items():
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".ipynb"):
            notebook = shown_notebook(nbformat.read(ROOT / origin, as_version=4))
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = relinked(cell.source, origin, page, pages, source)
            nbformat.write(notebook, source / page)
        else:
            text = relinked((ROOT / origin).read_text(encoding="utf-8"), origin, page, pages, source)
            (source / page).write_text(text + (side() if page == "index.md" else ""), encoding="utf-8")
    write_api(source / "api")


def contents(caption: str, names: list[str]) -> str:
    """A hidden table of contents, which becomes the bar at the side."""
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""])


def side() -> str:
    """The tables of contents of the first page; notebooks in the order of the README's table."""
    notebooks = re.findall(
        r"^\| \[.+?\]\((notebooks/\w+)\.ipynb\)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    others = sorted({path.stem for path in DOCS.glob("*.md")} - {*GUIDES, *BACKGROUND})
    return "".join(
        (
            contents("Notebooks", notebooks),
            contents("Guides", [*GUIDES, *others]),
            contents("Background", [*BACKGROUND, "experiments"]),
            contents("Code", ["contributing", "api/index"]),
        )
    )


def relinked(text: str, origin: str, page: str, pages: Mapping[str, str], source: Path) -> str:
    """The text of `origin` with links that hold in the site.

    Links to pages lead to pages, images are copied, and the name of any other file stands beside its link's text.
    """

    def replace(match: re.Match) -> str:
        target, _, anchor = (match["target"] or "").partition("#")
        if match["code"] or re.match(r"\w+:", target) or not target:
            return match[0]
        path = PurePosixPath(os.path.normpath(PurePosixPath(origin).parent / target)).as_posix()
        if not (ROOT / path).exists():
            raise ValueError(f"{origin} links to {target}, which is not there")
        here = PurePosixPath(page).parent
        if path in pages:
            return f"{match['open']}{os.path.relpath(pages[path], here)}{'#' + anchor if anchor else ''})"
        if match["open"].startswith("!"):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, source / path)
            return f"{match['open']}{os.path.relpath(path, here)})"
        return f"{match['text']} (`{path}`)" if match["text"] not in path else f"`{path}`"

    return LINK.sub(replace, text)


def shown_notebook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a page: what JupyterLab folds away is folded away, directives of the tests are left out, figures
    have alternative text."""
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    text, title = "", ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text, title = cell.source, title or cell.source.splitlines()[0].lstrip("# ")
            continue
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("# NBVAL_"))
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            cell.metadata["mystnb"] = {"image": {"alt": alternative(text, title)}}
    return notebook


def alternative(text: str, title: str) -> str:
    """What a figure shows, in words: the notebook's title, the heading and the first sentence of the text before it."""
    plain = re.sub(r"[*`$_\\]|\]\([^)]*\)|[\[\]]", "", text)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    heading = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
    prose = " ".join(line for line in lines if not line.startswith(("#", "|", "-")))
    sentence = re.split(r"(?<=[.?!]) ", prose)[0]
    return ": ".join(dict.fromkeys(part for part in (title, heading, sentence) if part))[:400]


# ---- API pages


def write_api(folder: Path) -> None:
    """A page for each module, below that of its package, and a list of them with their first sentences."""
    folder.mkdir()
    package = ROOT / "toco_core"
    rows, below = [], defaultdict(list)
    for path in sorted(package.rglob("*.py"), key=lambda path: (len(path.relative_to(package).parts), path)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        text = ast.get_docstring(tree) or ""
        (folder / f"{name}.md").write_text("\n".join(module_page(name, tree)), encoding="utf-8")
        parent = name.rpartition(".")[0]
        below["index" if parent in ("", "toco_core") else parent].append(f"{name.removeprefix('toco_core.')} <{name}>")
        rows.append(f"| [`{name}`]({name}.md) | {escaped(first_sentence(text)).replace('|', chr(92) + '|')} |")
    index = ["# Modules", "", "| Module | |", "|---|---|", *rows, ""]
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
    for parent, names in below.items():
        with (folder / f"{parent}.md").open("a", encoding="utf-8") as page:
            page.write("\n".join(["", "```{toctree}", ":hidden:", "", *names, "```", ""]))


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:?])\s", text.strip().replace("\n", " "))[0].rstrip(":")


def module_page(name: str, tree: ast.Module) -> Iterator[str]:
    """Its docstring, public functions, classes, their public methods, properties and fields."""
    yield from (
        f"# {name.replace('__', chr(92) + '_' + chr(92) + '_')}",
        "",
        "```{py:module} " + name,
        "```",
        "",
        *documented(tree),
        "",
    )
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            yield from entry("function", node.name, signature(node), documented(node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from class_entries(node)


def class_entries(node: ast.ClassDef) -> Iterator[str]:
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    yield from entry("class", node.name, bases.replace("'", ""), documented(node))
    for i, part in enumerate(node.body):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id[0] != "_":
            after = node.body[i + 1] if i + 1 < len(node.body) else None
            options = [f":type: {ast.unparse(part.annotation)}", *value_of(part)]
            yield from entry("attribute", f"{node.name}.{part.target.id}", "", field_text(part, after), options)
        elif isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) and not part.name.startswith("_"):
            kinds = {ast.unparse(decorator).split(".")[-1] for decorator in part.decorator_list}
            if kinds & {"property", "cached_property"}:
                options = [f":type: {ast.unparse(part.returns)}"] if part.returns else []
                yield from entry("property", f"{node.name}.{part.name}", "", documented(part), options)
            elif not kinds & {"setter", "overload"}:
                options = [f":{kind}:" for kind in ("classmethod", "staticmethod") if kind in kinds]
                bound = "staticmethod" not in kinds
                yield from entry(
                    "method", f"{node.name}.{part.name}", signature(part, bound=bound), documented(part), options
                )


def entry(kind: str, name: str, arguments: str, text: list[str], options: list[str] = ()) -> Iterator[str]:
    yield from (f"`````{{py:{kind}}} {name}{arguments}", *options, "", *text, "`````", "")


def signature(node: ast.FunctionDef, *, bound: bool = False) -> str:
    """Arguments and result as they are written, without `self`."""
    arguments = node.args
    if bound:
        first = arguments.posonlyargs or arguments.args
        del first[:1]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){result}".replace("\n", " ")


def value_of(part: ast.AnnAssign) -> list[str]:
    """The default of a field: that of `option(default, help)`, or the value that is written."""
    value = part.value
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "option":
        value = value.args[0]
    elif isinstance(value, ast.Call):
        return []
    return [f":value: {ast.unparse(value)}"] if value is not None else []


def field_text(part: ast.AnnAssign, after: ast.stmt | None) -> list[str]:
    """What is written of a field: the help of `option`, or the string below it."""
    if isinstance(part.value, ast.Call) and len(part.value.args) > 1 and isinstance(part.value.args[1], ast.Constant):
        return markdown(" ".join(part.value.args[1].value.split()))
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        return markdown(" ".join(after.value.value.split()))
    return []


def documented(node: ast.AST) -> list[str]:
    return markdown(ast.get_docstring(node) or "")


def markdown(text: str) -> list[str]:
    """A docstring as Markdown: `Args:` becomes a list, indented blocks are shown as they are, nothing else is markup
    but code between backquotes, lists and emphasis."""
    found: list[str] = []
    section = block = False
    for line in text.splitlines():
        stripped, indent = line.strip(), len(line) - len(line.lstrip())
        if section and stripped and not indent:
            section = False
            found.append("")
        if stripped in ("Args:", "Attributes:", "Returns:") and not indent:
            section = True
            found += ["", f"**{stripped[:-1]}**", ""]
        elif section:
            new = indent == 4 and re.match(r"[\w*, ]+:", stripped)
            found.append(re.sub(r"^([\w*, ]+):", r"- `\1`:", escaped(stripped)) if new else "  " + escaped(stripped))
        else:
            starts = indent >= 4 and (block or not found or not found[-1].strip())
            block = starts or (block and not stripped)
            found.append(line if starts else escaped(line))
    return found


def escaped(line: str) -> str:
    """Markdown and HTML that is not meant, made plain outside of code."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([<$\[\]{}])", r"\\\1", part) for part in parts)


def main(arguments: list[str] | None = None) -> int:
    """Assemble and build; the exit status is Sphinx's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    from sphinx.cmd.build import build_main

    assemble(folder / "source")
    return build_main(["-q", "-W", "--keep-going", "-b", "html", str(folder / "source"), str(folder / "html")])


if __name__ == "__main__":
    sys.exit(main())
