"""The style of report.html: light and dark, and readable on a phone."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f5f6f7;
  --ink: #1f2328; --quiet: #59636e; --faint: #d9dce0;
  --full: #0072b2; --lora: #c04f00; --card: #6b6f76; --warn: #8a5a00; --warn-ground: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --raised: #1d2126;
  --ink: #e7eaee; --quiet: #a3abb5; --faint: #363c44;
  --full: #56b4e9; --lora: #ff9a5a; --card: #a9afb7; --warn: #f0c060; --warn-ground: #2d2615; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 76rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p, ul { max-width: 62rem; }
ul { padding-left: 1.2rem; }
.first { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem 2.2rem; align-items: start; }
.verdict { font-size: 1.22rem; line-height: 1.45; margin: 0 0 1.1rem; overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .7rem; margin: 0; }
.numbers div { background: var(--raised); border-radius: 6px; padding: .6rem .8rem; }
.numbers dt { color: var(--quiet); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.numbers dd + dd { font-size: .8rem; font-weight: 400; line-height: 1.35; color: var(--quiet);
  overflow-wrap: anywhere; }
.first figure svg { max-width: none; }
a { color: var(--full); }
.quiet { color: var(--quiet); font-size: .92rem; overflow-wrap: anywhere; }
.notes p { margin: .4rem 0 0; }
.warn { background: var(--warn-ground); border-left: 4px solid var(--warn); border-radius: 4px;
  padding: .6rem 1.1rem; overflow-wrap: anywhere; }
.warn h2 { margin: 0; font-size: 1rem; color: var(--warn); }
.warn ul { margin: .3rem 0; }
.scroll { overflow-x: auto; border: 1px solid var(--faint); border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .75rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--faint); }
td.wide { white-space: normal; min-width: 11rem; max-width: 30rem; overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
thead th { background: var(--raised); font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--ground); font-weight: 500; }
tbody th:not(.number) { min-width: 14rem; }
thead th:first-child { background: var(--raised); }
.number { text-align: right; }
.full { color: var(--full); } .lora { color: var(--lora); } .card { color: var(--card); }
.key { font-weight: 600; }
details { margin: .8rem 0; }
summary { cursor: pointer; padding: .3rem 0; font-weight: 600; }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--full); outline-offset: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.6rem 2rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
@media (max-width: 52rem) { .first { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 40rem) { body { padding-top: .8rem; } h1 { font-size: 1.15rem; margin-bottom: .4rem; }
  .verdict { font-size: 1rem; margin-bottom: .7rem; } .numbers { gap: .4rem; } .numbers div { padding: .4rem .5rem; }
  .numbers dd { font-size: 1.1rem; } .numbers dd + dd { font-size: .7rem; }
  th, td { padding: .35rem .55rem; } td.wide, tbody th { white-space: normal; }
  tbody th:not(.number) { min-width: 7rem; max-width: 9.5rem; overflow-wrap: anywhere; }
  .epochs tr { display: flex; } .epochs tr > * { flex: 0 0 5.2rem; min-width: 0; }  /* the losses first */
  .epochs tr > :nth-child(1) { flex-basis: 4.3rem; } .epochs tr > :nth-child(2) { flex-basis: 7.2rem;
    white-space: normal; position: sticky; left: 4.3rem; background: var(--ground); }
  .epochs thead tr > :nth-child(2) { background: var(--raised); }
  .epochs tr > :nth-child(n+5) { flex-basis: 9rem; }
  .epochs tr > :nth-child(3), .epochs tr > :nth-child(4) { order: 2; }
  .epochs tr > :nth-child(4) { flex-basis: 8.2rem; }
  .epochs tr > :nth-child(5), .epochs tr > :nth-child(n+7) { order: 1; } }
@media print { .scroll { overflow: visible; } }
"""
