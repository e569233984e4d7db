"""The look of the report and the small pieces of HTML it is made of. No content of its own.

One column of text, tables that turn into cards on a telephone, figures side by side on a desk; prints on
white paper. Nothing is loaded from anywhere: no script, no font, no image.
"""

from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root{--ink:#1d1d1f;--soft:#5c5f66;--line:#dcdcd8;--paper:#fff;--wash:#f6f5f1;--accent:#0b3c66;
--warn:#8a3208}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 Charter,"Bitstream Charter",
"Sitka Text",Cambria,Georgia,serif}
main{max-width:1120px;margin:0 auto;padding:40px 28px 80px}
h1,h2,h3,th,.sans,nav,figcaption,.tag,dt,table{font-family:"Helvetica Neue",Helvetica,Arial,
"Liberation Sans",sans-serif}
h1{font-size:34px;line-height:1.15;font-weight:600;letter-spacing:-.01em;margin:0 0 12px}
h2{font-size:22px;line-height:1.25;font-weight:600;margin:56px 0 12px;padding-top:14px;
border-top:1px solid var(--line)}
h3{font-size:17px;line-height:1.35;font-weight:600;margin:38px 0 4px}
h3 span{color:var(--soft);font-weight:400}
p{margin:0 0 12px;max-width:44em}
.lede{font-size:19px;color:#333;max-width:40em}
.tag{display:inline-block;margin:0 0 14px;padding:3px 10px;border:1.5px solid var(--warn);
border-radius:3px;color:var(--warn);
font-size:13.5px;font-weight:600;letter-spacing:.02em}
nav{font-size:14px;margin:18px 0 0}
nav a{color:var(--accent);margin-right:18px;text-decoration:none;border-bottom:1px solid #b9cbdb;
white-space:nowrap}
.law{font-size:18px;margin:2px 0 10px}
.refused{color:var(--warn);font-weight:600}
.soft{color:var(--soft)}
.wrap{overflow-x:auto;margin:10px 0 18px}
table{border-collapse:collapse;width:100%;font-size:14px;line-height:1.4;
font-variant-numeric:tabular-nums lining-nums}
th{font-weight:600;text-align:left;color:var(--soft);font-size:12.5px;vertical-align:bottom;
padding:6px 14px 6px 0;
border-bottom:1.5px solid var(--ink)}
td{vertical-align:top;padding:7px 14px 7px 0;border-bottom:1px solid var(--line)}
td.num,th.num{text-align:left;white-space:nowrap}
td small{display:block;color:var(--soft);font-size:12.5px}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(310px,1fr));gap:6px 22px;
margin:10px 0 2px}
.wide .panels{grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.panels>div{max-width:560px}
.panels svg{display:block;width:100%;height:auto}
svg text{font-family:"Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif!important}
figure{margin:0 0 14px}
figcaption{font-size:13px;color:var(--soft);max-width:60em}
ul.checks{list-style:none;padding:0;margin:6px 0 14px;font:14px/1.5 "Helvetica Neue",Helvetica,Arial,
"Liberation Sans",sans-serif}
ul.checks li{padding-left:24px;position:relative}
ul.checks li::before{position:absolute;left:2px;font-weight:700}
ul.checks .yes::before{content:"\\2713";color:#3f7d4f}
ul.checks .no::before{content:"\\2717";color:var(--warn)}
ul.checks .open::before{content:"\\25CB";color:var(--soft);font-weight:400}
dl{display:grid;grid-template-columns:minmax(150px,230px) 1fr;gap:0 22px;font-size:15.5px;margin:10px 0}
dt{font-size:13.5px;font-weight:600;color:var(--soft);padding:8px 0;border-top:1px solid var(--line)}
dd{margin:0;padding:7px 0;border-top:1px solid var(--line);overflow-wrap:anywhere}
sup{font-size:.72em;line-height:0}
i.v{font-style:italic}
@media (max-width:640px){
body{font-size:16px}main{padding:24px 15px 60px}h1{font-size:27px}h2{font-size:20px;margin-top:42px}.lede{
font-size:17px}
table.cards thead{display:none}table.cards,table.cards tbody,table.cards tr,table.cards td{display:block;
width:100%}
table.cards tr{padding:9px 0;border-bottom:1px solid var(--line)}
table.cards td{border:0;padding:2px 0;display:flex;justify-content:space-between;gap:16px;text-align:right}
table.cards td::before{content:attr(data-label);color:var(--soft);text-align:left;flex:0 0 auto;
max-width:45%}
table.cards td:first-child{display:block;text-align:left;font-weight:600}
table.cards td:first-child::before{content:none}
table.cards td.wide{display:block;text-align:left}table.cards td.wide::before{content:none}
table.cards td:has(small):not(:first-child)::before{flex-basis:32%}
table.cards td:not(:first-child) small{flex:0 0 44%}
td.num,td small{white-space:normal}
dl{display:block}dd{border:0;padding:0 0 9px}
}
@media print{
@page{margin:16mm 14mm}
body{font-size:10.5pt}main{max-width:none;padding:0}nav{display:none}
h2{break-after:avoid;margin-top:26pt}h3{break-after:avoid}figure,tr,dl>*{break-inside:avoid}
.panels{grid-template-columns:1fr 1fr}.wrap{overflow:visible}table{font-size:9pt}a{color:inherit}
}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document that stands alone."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of ready HTML cells. A row shorter than `heads` lets its last cell span the rest."""
    head = "".join(f"<th>{h}</th>" for h in heads)
    body = []
    for row in rows:
        cells = []
        for i, (cell, label) in enumerate(zip(row, heads, strict=False)):
            last = i == len(row) - 1 and len(row) < len(heads)
            span = f' colspan="{len(heads) - i}" class="wide"' if last else ""
            cells.append(f'<td{span} data-label="{plain(label)}">{cell}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wrap"><table '
        f'class="cards"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def plain(html: str) -> str:
    """HTML without its tags, safe inside an attribute."""
    out, inside = [], False
    for c in html:
        inside = c == "<" or (inside and c != ">")
        if not inside and c != ">":
            out.append(c)
    return "".join(out).replace('"', "&quot;")


def figure(panels: Sequence[str], caption: str, *, wide: bool = False) -> str:
    """Panels side by side where there is room, with a caption; `wide` ones at most two to a row."""
    inner = "".join(f"<div>{p}</div>" for p in panels)
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><div class="panels">{inner}</div><figcaption>{escape(caption)}</figcaption></figure>'


def checks(items: Iterable[tuple[bool | None, str]]) -> str:
    """A list with a tick, a cross, or a ring for what could not be checked."""
    mark = {True: "yes", False: "no", None: "open"}
    word = {True: "holds: ", False: "fails: ", None: "not checked: "}
    lines = (f'<li class="{mark[ok]}" aria-label="{word[ok]}">{text}</li>' for ok, text in items)
    return f'<ul class="checks">{"".join(lines)}</ul>'


def definitions(items: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in items) + "</dl>"
