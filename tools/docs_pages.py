"""What the documentation site shows besides docs/, made when it is built: references from schema and docstrings, manuals, tables.

A hook of mkdocs (mkdocs.yml names it). In a page, `<!-- manual: freeze -->` stands for what `graphopt passes freeze` prints,
`<!-- table: supervise.md -->` for a file of tools/tables with the command that made it, `<!-- options: timm -->` for what becomes of the
options of timm's script, and `<!-- options: study -->` for the keys of a study. Links to files of the repository lead to the pages that are
made from them.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import graphopt
from graphopt.compiler.registry import passes
from graphopt.spec import schema
from graphopt.spec.writing import kind_of, option_texts, toml_value, without_attributes
from graphopt.studies.study import Study
from graphopt.timm_args import GROUPS, Option
from graphopt.timm_args.arguments import shown

ROOT = Path(__file__).parents[1]
TABLES = sorted((ROOT / "tools" / "tables").glob("*.md"))
LAUNCH = sorted((ROOT / "docs" / "launch").iterdir())
#: pages of the site that are made from files elsewhere in the repository; the file of each
SOURCES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
SOURCES |= {"launch.md": "docs/launch", "tables/index.md": "tools/tables"} | {f"tables/{t.name}": f"tools/tables/{t.name}" for t in TABLES}

_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
_MARKER = re.compile(r"^<!-- (manual|table|options): (\S+) -->$", re.MULTILINE)


# ---- what mkdocs calls


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in [path for path in (f.src_uri for f in files) if path.startswith("launch/")]:
        files.remove(files.get_file_from_path(path))  # its text is in launch.md
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return relinked(_MARKER.sub(_inserted, markdown), page.file.src_uri)


# ---- pages


def generated() -> dict[str, str]:
    """The pages that have no file in docs/, by their path on the site."""
    texts = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in SOURCES.items() if (ROOT / source).is_file()}
    return texts | {"launch.md": _launch(), "tables/index.md": _tables(), "spec.md": _spec(), "api.md": _api()}


def relinked(markdown: str, page: str) -> str:
    """Links to files of the repository lead to the pages that are made from them."""
    here = SOURCES.get(page, f"docs/{page}")
    pages = {source: target for target, source in SOURCES.items()}

    def there(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[1]))
        target = pages.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None) or ""
        return posixpath.relpath(target, posixpath.dirname(page) or ".") if target else found[1]

    return _LINK.sub(there, markdown)


def _inserted(found: re.Match[str]) -> str:
    kind, name = found.groups()
    if kind == "manual":
        return manual(name)
    if kind == "options":
        return {"timm": timm_options, "study": study_keys}[name]()
    head, _, rest = (ROOT / "tools" / "tables" / name).read_text(encoding="utf-8").partition("\n")
    assert head.startswith("# "), name
    return rest.strip()


def manual(use: str) -> str:
    """A pass's manual: what its module and its class say, its options, and what it promises."""
    cls = passes()[use]
    texts = dict.fromkeys((inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""), without_attributes(cls.__doc__ or "")))
    meanings = option_texts(cls)
    rows = []
    for name, field in cls.model_fields.items():
        value = "start" if name == "when" else None if field.is_required() else field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else "" if value is None else f"`{toml_value(value)}`"
        rows.append((f"`{field.alias or name}`", default, meanings.get(name) or kind_of(cls, name)))
    promises: list[tuple[str, list[str]]] = [("preserves", sorted(cls.preserves)), ("its regions are", [cls.claim] if cls.claim else [])]
    promises.append(("they must not also be", sorted(cls.conflicts_with)))
    lines = [f"- {what}: {', '.join(of)}" for what, of in promises if of]
    return "\n\n".join([*filter(None, texts), _grid(("option", "default", "meaning"), rows), "\n".join(lines)])


def timm_options() -> str:
    """What becomes of each option of timm's training script, by groups."""
    return "\n\n".join(f"## {title}\n\n{_grid(('option', 'default', 'in the spec'), _rows(group))}" for title, group in GROUPS.items())


def study_keys() -> str:
    """Every key of a study's file."""
    whole = Study.model_json_schema()
    tables = {"top level": whole, "[[variant]]": whole["$defs"]["Variant"], "[[published]]": whole["$defs"]["Published"]}
    return "\n\n".join(f"### {title}\n\n{_keys(table)}" for title, table in tables.items())


def _keys(table: Mapping[str, Any]) -> str:
    required = set(table.get("required", ()))
    rows = []
    for key, item in table["properties"].items():
        default = "required" if key in required else f"`{_toml(item['default'])}`" if item.get("default") is not None else ""
        rows.append((f"`{key}`", _kind(item), default, item.get("description", "")))
    return _grid(("key", "value", "default", "meaning"), rows)


def _rows(group: tuple[Option, ...]) -> list[tuple[str, str, str]]:
    rows = []
    for option in group:
        said = [f"`{option.keys}`" if option.keys.replace("_", "").replace(".", "").isalpha() else option.keys]
        said += [f"{word}: {why}" for word, why in (("refused", option.refused), ("no effect", option.unused)) if why]
        default = "" if option.default in (None, "") else f"`{shown(option.default)}`"
        rows.append((f"`{option.name}`", default, "; ".join(filter(None, said))))
    return rows


def _grid(head: tuple[str, ...], rows: Iterable[Sequence[str]]) -> str:
    cells = [" | ".join(text.replace("|", "\\|").replace("\n", " ") for text in row) for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {row} |" for row in cells)


def _launch() -> str:
    texts = [f"## {path.name}\n\n```\n{path.read_text(encoding='utf-8').rstrip()}\n```" for path in LAUNCH]
    head = "# Launch files\n\nFiles of `docs/launch`, to be copied and changed; see [many devices](many-devices.md)."
    return "\n\n".join([head, *texts]) + "\n"


def _tables() -> str:
    rows = []
    for path in TABLES:
        title, _, rest = path.read_text(encoding="utf-8").partition("\n")
        rows.append((f"[{title.removeprefix('# ')}]({path.name})", rest.strip().partition("\n\n")[0]))
    text = "Each table names the command that prints it, the date and the device."
    return f"# Measured tables\n\n{text}\n\n{_grid(('table', 'what it shows'), rows)}\n"


# ---- references


def _api() -> str:
    """One entry for each public name; mkdocstrings puts its docstring there."""
    names = [name for name in graphopt.__all__ if name != "Selector"]  # a type alias: the README explains selectors
    errors = [name for name in names if name.endswith("Error")]
    functions = [name for name in names if name.islower()]
    classes = [name for name in names if name not in (*errors, *functions)]
    parts = []
    for title, group in (("Functions", functions), ("Classes", sorted(classes, key=lambda n: n != "Plan")), ("Errors", errors)):
        parts += [f"## {title}", *(f"::: {_place(name)}" for name in group)]
    return "\n\n".join(["# The API", "All of it is imported from `graphopt`.", *parts]) + "\n"


def _place(name: str) -> str:
    found = getattr(graphopt, name)
    return f"{found.__module__}.{name}"


def _spec() -> str:
    """Every key of a spec, from the JSON Schema that `graphopt schema` prints."""
    whole = schema()
    parts = ["# The spec", "Every key, with its default. `graphopt schema -o graphopt.schema.json` writes the same for editors."]
    for title, table in _sections(whole):
        parts += [f"## {title}", _keys(table)]
    return "\n\n".join(parts) + "\n"


def _sections(whole: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    tables: dict[str, str | Mapping[str, Any]] = {
        "top level": whole,
        "[backbone]": "BackboneSpec",
        "[backbone.weights]": "WeightsSpec",
        "[data]": "DataSpec",
    }
    tables |= {"[data.augment]": "AugmentSpec", "[train]": "TrainSpec", "[train.optimizer]": "OptimizerSpec"}
    tables |= {"[train.scheduler]": "SchedulerSpec", "[train.loss]": "LossSpec", "[train.distill]": "DistillSpec"}
    tables |= {"[train.fsdp]": "FsdpSpec", "[backbone.head_init]": "HeadInitSpec"}
    for title, name in tables.items():
        yield title, whole["$defs"][name] if isinstance(name, str) else name
    for branch in whole["properties"]["pass"]["items"]["anyOf"]:
        if use := branch["properties"]["use"].get("const"):
            yield f"[[pass]] {use}", branch


def _toml(value: Any) -> str:
    return "..." if isinstance(value, dict) and value else toml_value(value)


def _kind(item: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if "$ref" in item:
        return item["$ref"].rpartition("/")[2].removesuffix("Spec")
    if "const" in item:
        return f"`{toml_value(item['const'])}`"
    if "enum" in item:
        return " or ".join(f"`{toml_value(value)}`" for value in item["enum"])
    if either := item.get("anyOf") or item.get("oneOf"):
        return " or ".join(dict.fromkeys(kind for each in either if (kind := _kind(each)) != "null"))
    if item.get("type") == "array":
        return f"array of {_kind(item['items'])}" if item.get("items") else "array"
    if isinstance(item.get("type"), list):
        return " or ".join(item["type"])
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{words} {item[key]:g}" for key, words in bounds.items() if key in item]
    kind = {"string": "text", "object": "table", "boolean": "true or false"}.get(item.get("type", ""), item.get("type", "any"))
    return f"{kind} ({', '.join(limits)})" if limits else kind
