"""The style sheet and the script of the report, in the page itself so that it needs no other file."""

from __future__ import annotations

__all__ = ["CSS", "SCRIPT"]

_LIGHT = """--paper:#ffffff;--panel:#f6f7f9;--ink:#16181d;--muted:#59606b;--grid:#c9ced6;--faint:#aab1bb;--best:#e4eefb;
--s1:#0067b1;--s2:#c94f00;--s3:#00805c;--s4:#9b3f85;--s5:#a67c00;--s6:#2f97d0;--s7:#16181d;
--good:#00704f;--bad:#b03a00;"""
_DARK = """--paper:#14161a;--panel:#1c1f25;--ink:#e8eaee;--muted:#a3abb8;--grid:#414854;--faint:#5d6573;--best:#1f3350;
--s1:#5ab0f0;--s2:#ff8c42;--s3:#35c79c;--s4:#df8fca;--s5:#e8c040;--s6:#9fd4f5;--s7:#f2f3f5;
--good:#4fd3a5;--bad:#ff9a5c;"""

CSS = (
    f""":root{{color-scheme:light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2.5rem) 3rem;max-width:84rem;background:var(--paper);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
h1{font-size:1.65rem;line-height:1.2;margin:.2rem 0 .6rem}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--grid)}
h3{font-size:1.05rem;margin:1.4rem 0 .3rem}
h4{font-size:.9rem;margin:.6rem 0 .2rem}
p,ul{max-width:60rem;margin:.4rem 0 .7rem}
ul{padding-left:1.3rem}
nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.6rem 0}
a{color:var(--s1)}
code,pre{font:.85em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--panel);padding:.6rem .8rem;border-radius:6px}
.small{font-size:.78rem;color:var(--muted);font-weight:400;line-height:1.3}
.scroll{overflow-x:auto;margin:.6rem 0 .8rem;-webkit-overflow-scrolling:touch}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .6rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{font-weight:600;vertical-align:bottom;background:var(--panel)}
tbody th{font-weight:500}
.n{text-align:right;white-space:nowrap}
td .small{display:block}
.data tbody th{min-width:5rem;max-width:26rem}
.keep,time{white-space:nowrap}.words{min-width:14rem}
.main th[scope=colgroup]{text-align:center;line-height:1.25}
.main th[scope=colgroup] span{display:block}
.main thead tr+tr th{text-align:right}
.main .first{border-left:1px solid var(--grid)}
.main tbody th,.main .corner{position:sticky;left:0;z-index:1;background:var(--paper);min-width:9rem;max-width:17rem}
.main .corner{background:var(--panel);z-index:2}
.main tbody th .name{display:block}
.main tbody th .about{display:block;white-space:nowrap}
@media (min-width:40.01rem){.main.plain tbody th{max-width:none}
 .main.plain tbody th .name,.main.plain tbody th .about{display:inline-block}
 .main.plain tbody th .about{margin-left:.5rem}}
.main thead .small,.data thead .small{display:block}
.main tbody tr.gradient th{border-left:4px solid var(--s1)}
.main tbody tr.baseline th{border-left:4px double var(--s2)}
.main tbody tr:hover td,.main tbody tr:hover th{background:var(--panel)}
.main td.best{background:var(--best)}
.place{font-weight:500;color:var(--muted)}
.mark{display:inline-block;font-size:.72rem;line-height:1.35;padding:0 .4em;border-radius:1em;
 border:1px solid;font-weight:500}
.mark.gradient{color:var(--s1)}
.mark.baseline{color:var(--s2);border-style:dashed}
.verdict{font-weight:600;display:block}
.verdict.better{color:var(--good)}.verdict.worse{color:var(--bad)}.verdict.cannot{color:var(--muted);font-weight:500}
button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:.2rem 0;
 cursor:pointer;white-space:nowrap}
button:hover,button:focus-visible{text-decoration:underline}
[aria-sort] button::after{content:" ▾"}
[aria-sort=ascending] button::after{content:" ▴"}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.9rem}
.panels.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.curves>div{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem}
.curves>div>svg{flex:1 1 20rem;max-width:34rem;align-self:flex-start}
.curves>div>div{flex:1 1 12rem}
figure{margin:0;padding:.6rem .7rem;background:var(--panel);border-radius:8px;break-inside:avoid}
figcaption{margin-bottom:.3rem}
figcaption .small{display:block}
svg{display:block;width:100%;height:auto;font-family:inherit}
.heat figure{padding:.4rem}
.legend{list-style:none;margin:.3rem 0 0;padding:0;columns:13rem;column-gap:1.2rem;font-size:.84rem}
.legend li{display:flex;align-items:center;gap:.5rem;padding:.08rem .2rem;break-inside:avoid;
 cursor:pointer;border-radius:4px}
.legend .name{flex:1;min-width:0}
.legend .line,.legend .dash{width:1.6rem;flex:none;border-top:3px solid}
.legend .dash{border-top-style:dashed}
.legend li:hover,.legend li:focus-visible,.legend li.on{background:var(--best);outline:none}
.curves.pick .curve{opacity:.12}
.curves.pick .curve.on{opacity:1}
.curves.pick .curve.on path{stroke-width:3!important}
.picture{margin:.6rem 0 .9rem}.picture img{display:block;max-width:100%;height:auto;background:#fff;border-radius:6px}
details{margin:.3rem 0;border:1px solid var(--grid);border-radius:6px;padding:.3rem .7rem}
summary{cursor:pointer;font-weight:500;overflow-wrap:anywhere}
.samples{display:flex;flex-wrap:wrap;gap:.2rem 1.6rem}
dl{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:.15rem 1rem;margin:.5rem 0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:40rem){body{font-size:15px}th,td{padding:.28rem .45rem}
 .main tbody th,.main .corner{min-width:8rem;max-width:9.5rem}
 .data tbody th{max-width:11rem}.main tbody th .about{white-space:normal}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll{overflow:visible}
 table{font-size:8pt}th,td{padding:.15rem .3rem}.main tbody th,.main .corner{position:static}
 figure,thead th,.mark,.best,.legend .line,.legend .dash{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 h2,h3,figcaption{break-after:avoid}tr,p{break-inside:avoid}section>p{break-after:avoid}
 td .small,th .small{font-size:.92em}@page{margin:12mm}}
"""
)

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.querySelectorAll("th button")];
  heads.forEach((button, column) => button.addEventListener("click", () => {
    const head = button.closest("th"), now = head.getAttribute("aria-sort");
    const way = now ? (now === "ascending" ? "descending" : "ascending") : button.dataset.first;
    heads.forEach(other => other.closest("th").removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1, key = row => row.cells[column].dataset.sort;
    body.append(...[...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (!x || !y) return !x - !y;
      return sign * (column ? x - y : x.localeCompare(y));
    }));
  }));
}
for (const figure of document.querySelectorAll("figure.curves")) {
  const show = item => {
    figure.querySelectorAll(".on").forEach(other => other.classList.remove("on"));
    figure.classList.toggle("pick", !!item);
    if (!item) return;
    for (const part of [item, ...figure.querySelectorAll(".curve-" + item.dataset.curve)]) part.classList.add("on");
  };
  for (const item of figure.querySelectorAll("li")) {
    for (const event of ["pointerenter", "focus"]) item.addEventListener(event, () => show(item));
    for (const event of ["pointerleave", "blur"]) item.addEventListener(event, () => show(null));
  }
}
addEventListener("beforeprint", () => document.querySelectorAll("details.print").forEach(part => part.open = true));
"""
