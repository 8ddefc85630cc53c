"""The style sheet of the report page."""

CSS = """
:root {
  --page: #f5f7f9; --paper: #ffffff; --ink: #1f2933; --muted: #52606d; --line: #d9dee3; --accent: #005a8e;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --paper: #1d232a; --ink: #e6eaee; --muted: #a7b1bb; --line: #36404a; --accent: #6cb8ea;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1140px; margin: 0 auto; padding: 40px 24px 64px; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-bottom: 12px; }
h3 { font-size: 1rem; }
section { margin-top: 40px; }
section > p { color: var(--muted); max-width: 75ch; margin-bottom: 12px; }
.kicker { color: var(--accent); font-weight: 600; font-size: .875rem; }
.counts { color: var(--muted); margin-top: 4px; }
.notice { margin-top: 8px; font-weight: 600; }
.facts { display: flex; flex-wrap: wrap; gap: 12px 32px; margin-top: 20px; }
.facts div { min-width: 0; }
.facts dt { color: var(--muted); font-size: .8125rem; }
.facts dd { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; }
.card, figure, .reading, .scroll, details {
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
}
.card { padding: 14px 16px; display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: 2px; }
.card:first-child { border-color: var(--accent); border-width: 2px; padding: 13px 15px; }
.card h2 { margin: 0; font-size: .875rem; font-weight: 500; line-height: 1.3; }
.number { font-size: 1.75rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.unit { font-size: .9375rem; font-weight: 500; color: var(--muted); }
.note { color: var(--muted); font-size: .8125rem; line-height: 1.35; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 16px; }
figure { padding: 12px; display: flex; flex-direction: column; background: #ffffff; }
figure img { display: block; width: 100%; max-width: 520px; height: auto; margin: 0 auto; }
figcaption { color: #52606d; font-size: .875rem; margin-top: auto; padding-top: 8px; }
.reading { padding: 20px; align-self: stretch; }
.reading p { margin-top: 10px; color: var(--muted); }
.reading strong { color: var(--ink); }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th {
  border-top: 0; color: var(--muted); font-size: .8125rem; font-weight: 600; white-space: normal;
  vertical-align: bottom; line-height: 1.3;
}
th:first-child { text-align: left; }
tbody th {
  font-weight: 500; white-space: normal; overflow-wrap: anywhere; min-width: 170px; max-width: 340px;
}
details { padding: 12px 16px; }
summary { cursor: pointer; font-weight: 600; }
.names dt { font-weight: 600; margin-top: 12px; overflow-wrap: anywhere; }
.names dd { color: var(--muted); overflow-wrap: anywhere; }
.definitions > div {
  display: grid; grid-template-columns: 1fr auto; gap: 2px 16px; padding: 14px 0;
  border-top: 1px solid var(--line);
}
.definitions dt { font-weight: 600; }
.definitions dd { grid-column: 1 / -1; color: var(--muted); max-width: 80ch; }
.definitions .value { grid-column: 2; grid-row: 1; color: var(--ink); font-variant-numeric: tabular-nums; }
.definitions .formula { color: var(--ink); font-family: Georgia, "Times New Roman", serif; }
sub { font-size: .75em; line-height: 0; }
@media (max-width: 1000px) { .cards { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 520px) {
  main { padding: 24px 14px 48px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 12px; }
  .card:first-child { padding: 11px; }
  figure { padding: 6px 6px 10px; }
  figcaption { padding: 8px 6px 0; }
  th, td { padding: 8px 10px; }
  tbody th { min-width: 125px; }
}
@media print { body { background: #ffffff; } section, figure { break-inside: avoid; } }
"""
