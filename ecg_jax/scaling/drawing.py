"""A drawing as SVG: panels for the page, one file for the folder, names and ids that never collide.

Nothing is drawn here. Invariant: the same figure gives the same bytes (no dates, ids from the drawing's name).
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ecg_jax.scaling.analysis import LawResult


@dataclass(frozen=True)
class Drawing:
    """`kind`: law, transfer or trajectory. `panels`: SVG elements. `file`: one SVG with all panels.
    `result`: the law's."""

    name: str
    kind: str
    caption: str
    panels: tuple[str, ...]
    file: str
    result: LawResult | None = None


def unique(kind: str, what: LawResult | tuple[str, ...], taken: set[str]) -> str:
    """A file name that says what it shows, and is unique."""
    key = what.runs.key if isinstance(what, LawResult) else None
    parts = (*key.family, key.dataset, key.task, key.domain) if key else what
    base = re.sub(r"[^a-z0-9]+", "-", "-".join([kind, *map(str, parts)]).lower()).strip("-")
    name, k = base, 2
    while name in taken:
        name, k = f"{base}-{k}", k + 1
    taken.add(name)
    return name


def svg(figure, salt: str) -> str:
    """The figure as one <svg> element whose ids are unique in the report."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    # Matplotlib numbers its groups from 1 in every figure; in one page they would collide.
    mark = re.sub(r"[^a-z0-9]+", "-", salt.lower())
    text = re.sub(r'\bid="', f'id="{mark}-', text)
    text = re.sub(r'href="#', f'href="#{mark}-', text)
    return re.sub(r"url\(#", f"url(#{mark}-", text)


def side_by_side(panels: Sequence[str]) -> str:
    """One SVG file that holds the panels in a row."""
    sizes = [tuple(map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', p).groups())) for p in panels]
    width, height = sum(w for w, _ in sizes), max(h for _, h in sizes)
    out, left = [], 0.0
    for panel, (w, h) in zip(panels, sizes, strict=True):
        placed = re.sub(r'width="[\d.]+pt"', f'width="{w:g}"', panel, count=1)
        placed = re.sub(r'height="[\d.]+pt"', f'height="{h:g}"', placed, count=1)
        out.append(placed.replace("<svg ", f'<svg x="{left:g}" y="0" ', 1))
        left += w
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width:g}pt" height="{height:g}pt" viewBox="0 0 {width:g} {height:g}">'
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    )
    return head + "\n".join(out) + "</svg>\n"
