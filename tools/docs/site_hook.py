"""Hooks of mkdocs: add the pages outside of docs/ and the table of public names, and check that no name is missing.

The README, the changelog, the studies and the benchmarks keep their places in the repository, where their links are
relative to their own folders. Here each gets an address on the site, and links between pages are rewritten to match.
A file that a page links to and that is no page (data, a script) is copied to the site.
"""

from __future__ import annotations

import base64
import functools
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("site")
ROOT = Path(__file__).parents[2]
NOTEBOOK, TOUR = "examples/tour.ipynb", "tour.md"
SINGLE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
FOLDERS = ("studies", "benchmarks")
"""Every Markdown file below these is a page, but for *.template.md, from which a README.md is generated."""

_FENCED = re.compile(r"^(```|~~~).*?^\1[ \t]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"""(?P<open>\]\(<?|\b(?:src|href)=")(?P<target>[^)\s"#>]*)(?P<anchor>#[^)\s">]*)?""")
_FOLDER_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#:]+)\)")
_CELL = re.compile(r"<td>.*?</td>")
_LONG_NAME = re.compile(r"(?<=<code>)[^<]{25,}(?=</code>)")
_INTERVAL = re.compile(r"(?<=<td>)([^<()]+) (\([^<()]+ to [^<()]+\))(?=</td>)")
_THOUSANDS = re.compile(r"<(pre|code)\b.*?</\1>|<[^>]*>|(?<=\d) (?=\d{3}(?!\d))", re.DOTALL)
_DIRECTIVE = re.compile(r"^::: ([\w.]+)", re.MULTILINE)


@functools.cache
def outside_pages() -> dict[str, str]:
    """Map the pages outside of docs/ to their addresses: a path in the repository to one below docs/."""
    found = {name: place for name, place in SINGLE.items() if (ROOT / name).exists()}
    found[NOTEBOOK] = TOUR
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.md")):
            name = path.relative_to(ROOT)
            place = name.parent / "index.md" if name.name == "README.md" else name
            if not name.name.endswith(".template.md"):
                found[name.as_posix()] = place.as_posix()
    return found


def titles(folder: str) -> Iterator[tuple[str, str]]:
    """Yield the heading and the address of each study, newest first."""
    for path in sorted((ROOT / folder).glob("*/README.md"), reverse=True):
        heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        yield (
            heading[1].replace("`", "") if heading else path.parent.name,
            f"{folder}/{path.parent.name}/index.md",
        )


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the studies into the navigation."""
    for entry in config.nav or []:
        if "Studies" in entry:
            overview = [{"Overview": "studies/index.md"}] if (ROOT / "studies" / "README.md").exists() else []
            entry["Studies"] = overview + [{title: place} for title, place in titles("studies")]
        if "Costs" in entry and not (ROOT / "benchmarks" / "README.md").exists():
            config.nav.remove(entry)
    return config


def add_notebook(files: Files, config: MkDocsConfig) -> None:
    """Add the notebook as a page: its cells, what they printed, and their figures."""
    parts = []
    for number, cell in enumerate(json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                name = f"tour-{number}.png"
                image = base64.b64decode(output["data"]["image/png"])
                files.append(File.generated(config, name, content=image))
                parts.append(f"![Output of the cell above]({name})")
    files.append(File.generated(config, TOUR, content="\n\n".join(parts)))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/."""
    add_notebook(files, config)
    for name, place in outside_pages().items():
        if place != TOUR:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def place_of(target: str) -> str | None:
    """Return the address below docs/ of a path in the repository, or None where nothing is there."""
    pages = outside_pages()
    if target in pages:
        return pages[target]
    if posixpath.join(target, "README.md") in pages:
        return pages[posixpath.join(target, "README.md")]
    path = ROOT / target
    if target.startswith("docs/"):
        return target.removeprefix("docs/") if path.is_file() else None
    return target if path.is_file() else None


def rewrite_links(markdown: str, source: str, own: str, files: Files, config: MkDocsConfig) -> str:
    """Rewrite the relative links of a page.

    Args:
        markdown: the text of the page.
        source: the page's path in the repository.
        own: its address below docs/.
        files: all files of the site; a linked file that is not yet among them is added.
        config: the configuration of the site.
    """

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if not target or re.match(r"[a-z]+:|/", target):
            return match[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = place_of(inside)
        if place is None:
            log.warning("%s links to %s, which is not in the repository", source, target)
            return match[0]
        file = files.get_file_from_path(place)
        if file is None:
            file = File.generated(config, place, abs_src_path=str(ROOT / inside))
            files.append(file)
        if match["open"].endswith('="'):  # mkdocs leaves HTML alone
            page = files.get_file_from_path(own)
            return f"{match['open']}{file.url_relative_to(page)}{anchor}"
        return match["open"] + posixpath.relpath(place, posixpath.dirname(own) or ".") + anchor

    def unlinked(match: re.Match[str]) -> str:
        """Keep the text alone of a link to a folder without a README, for which there is no page."""
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] if (ROOT / inside).is_dir() and place_of(inside) is None else match[0]

    def rewritten(text: str) -> str:
        return _LINK.sub(replaced, _FOLDER_LINK.sub(unlinked, text))

    parts, end = [], 0
    for code in _FENCED.finditer(markdown):
        parts += [rewritten(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, rewritten(markdown[end:])])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page's links and fill in the table of public names."""
    sources = {place: name for name, place in outside_pages().items()}
    own = page.file.src_uri
    if own == TOUR:
        return markdown  # its figures have no place in the repository
    if "<!-- public names -->" in markdown:
        markdown = markdown.replace("<!-- public names -->", names_table())
    return rewrite_links(markdown, sources.get(own, f"docs/{own}"), own, files, config)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Choose where lines break: not inside a number or a cell's interval, and in long names after a separator."""
    html = _THOUSANDS.sub(lambda found: "&nbsp;" if found[0] == " " else found[0], html)
    html = _INTERVAL.sub(r'\1 <span class="interval">\2</span>', html)
    return _CELL.sub(
        lambda cell: _LONG_NAME.sub(lambda name: re.sub(r"([_./:])", r"\1<wbr>", name[0]), cell[0]), html
    )


@functools.cache
def package() -> Any:
    """Read the package without importing it, with docstrings as on the site."""
    extensions = griffe.load_extensions(str(ROOT / "tools" / "docs" / "docstrings.py"))
    return griffe.load(
        "blockwise_lr", search_paths=[ROOT / "src"], resolve_aliases=True, extensions=extensions
    )


def names_table() -> str:
    """Return a row for each name that `blockwise_lr` exports: a link to its reference and its first sentence."""
    rows = ["| name | |", "| --- | --- |"]
    for name in map(str, package().exports):
        target = package()[name]
        home = next(
            f"blockwise_lr.{folder}.{name}"
            for folder in ("blocks", "sharpness", "optim", "directional", "optimizers", "experimental")
            if name in package()[folder].members
        )
        if not target.docstring:
            raise PluginError(f"blockwise_lr.{name} has no docstring: write one, it is a public name")
        first = " ".join(target.docstring.value.split("\n\n")[0].split())
        rows.append(f"| [`{name}`][{home}] | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def public_names(module: Any) -> list[str]:
    """Return what a module exports: its `__all__`, or the public names that it defines."""
    if module.exports is not None:
        return [str(name) for name in module.exports]
    return [name for name, member in module.members.items() if member.is_public and not member.is_module]


def missing(html: str, markdown: str) -> list[str]:
    """Return the public names of the modules that a page documents which the page lacks.

    Args:
        html: the page as it is shown.
        markdown: the page as it is written, with its `::: module` lines.
    """
    lacking = []
    for path in _DIRECTIVE.findall(markdown):
        module = package()[path.removeprefix("blockwise_lr.")]
        lacking += [f"{path}.{name}" for name in public_names(module) if f'id="{path}.{name}"' not in html]
    return lacking


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Fail at a public name without an entry on the page of its package: it has no docstring."""
    written = Path(page.file.abs_src_path).read_text(encoding="utf-8") if page.file.abs_src_path else ""
    for name in missing(output, written) if _DIRECTIVE.search(written) else []:
        log.warning("%s is public and not on %s: does it have a docstring?", name, page.file.src_uri)
    return output
