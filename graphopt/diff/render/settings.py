"""What a run was trained with, and its figures to take along: sections of a run's page."""

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.diff.render.page import escaped
from graphopt.spec import Spec

#: settings of a run that are shown whatever they are
_ALWAYS = ("train.epochs", "train.batch", "train.seed", "train.optimizer.name", "train.optimizer.lr", "train.scheduler.name", "data.name")
#: more records than this are not put into a page
_MOST = 20_000


def settings_section(spec: Spec | None, text: str, summary: Mapping[str, Any] | None) -> str:
    """Hyper-parameters, versions and the spec's text; `summary` is of a finished run."""
    rows = list(_settings(spec)) if spec is not None else []
    found = dict(summary or {})
    facts = {**found.get("versions", {}), "device": found.get("device"), "digest of the data": found.get("data")}
    versions = [(name, str(value)) for name, value in facts.items() if value]
    parts = [_table("Settings", rows), _table("Versions", versions)]
    whole = f"<details><summary>The whole spec</summary><pre>{escaped(text)}</pre></details>" if text.strip() else ""
    return f'<section><div class="facts">{"".join(parts)}</div>{whole}</section>'


def _settings(spec: Spec) -> Iterator[tuple[str, str]]:
    """The settings under [train] and [data] that are not the defaults, and the main ones in any case."""
    usual, own = (
        dict(_flat({key: of.resolved().get(key, {}) for key in ("train", "data")})) for of in (Spec(backbone=spec.backbone), spec)
    )
    for key, value in own.items():
        if value != usual.get(key) or key in _ALWAYS:
            yield key, value


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            if text:
                yield f"{prefix}{key}", text


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    body = "".join(f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>" for name, value in rows)
    return f"<div><h2>{title}</h2><table>{body}</table></div>"


def csv_links(epochs: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    """Links that save the run's metrics as CSV; the files are in the page itself."""
    links = [_link(f"{what}.csv", what, records) for what, records in (("epochs", epochs), ("steps", steps)) if 0 < len(records) <= _MOST]
    return f'<p class="save">Save as CSV: {" · ".join(links)}</p>' if links else ""


def _link(name: str, what: str, records: Sequence[Mapping[str, Any]]) -> str:
    data = base64.b64encode(to_csv(records).encode()).decode()
    return f'<a download="{name}" href="data:text/csv;charset=utf-8;base64,{data}">{what}</a>'


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, with a column for every plain value that any of them has, in the order in which they come up."""
    plain = (key for record in records for key, value in record.items() if isinstance(value, int | float | str))
    columns = dict.fromkeys(key for key in plain if key not in ("kind", "crc32"))  # which record it is, and its checksum
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
