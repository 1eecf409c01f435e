'use strict';
// Draws the page of studies from `kvplan`, a study.json document (docs/formats/study.md).

const words = {C: 'confirmed', E: 'explained', R: 'refuted', '-': 'not run'};
const meaning = {
  C: 'holds as published', E: 'holds, but for another reason or under another count',
  R: 'does not hold', '-': 'needs a model or a device',
};

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const number = (x) => {
  if (x === null) return 'not finite';
  if (Number.isInteger(x)) return x.toLocaleString('en');
  return Math.abs(x) < 1e-4 ? x.toExponential(3) : String(Number(x.toPrecision(4)));
};

/** The interval in which a check passes. */
function range({expected, low, high}) {
  if (low === high) return number(low);
  if (expected !== null && high !== null) return `${number(expected)} ± ${number(high - expected)}`;
  if (low === null) return `≤ ${number(high)}`;
  if (high === null) return `≥ ${number(low)}`;
  return `${number(low)} … ${number(high)}`;
}

function table(header, rows) {
  return element('div', {class: 'scroll'}, element('table', {class: 'checks'},
    element('thead', {}, element('tr', {}, ...header.map((h) => element('th', {scope: 'col'}, h)))),
    element('tbody', {}, ...rows.map((cells) => element('tr', {}, ...cells.map((c) => element('td', {}, c)))))));
}

const badge = (letter) => element('span', {class: `badge verdict-${letter === '-' ? 'none' : letter}`}, words[letter]);
const passed = (check) => element('span', {class: check.passed ? 'passed' : 'failed'}, check.passed ? 'yes' : 'no');

function drawStudy(study) {
  const node = element('details', {id: study.id, class: 'study'},
    element('summary', {}, element('b', {}, study.id), ` ${study.title} `, badge(study.verdict)));
  const fact = (name, text) => element('p', {}, element('b', {}, `${name}. `), text);
  node.append(fact('Claim', study.claim), fact('Source', study.source), fact('Why', study.explanation));
  if (study.verdict !== '-' && study.verdict !== study.expected_verdict)
    node.append(fact('Finding', `the expected verdict was ${words[study.expected_verdict]}`));
  if (study.not_run_reason) node.append(fact('Not run', study.not_run_reason));
  if (study.checks.length > 0)
    node.append(table(['check', 'role', 'measured', 'passes at', 'passed'], study.checks.map((check) =>
      [check.name, check.role, `${number(check.measured)} ${check.unit}`, range(check), passed(check)])));
  for (const {title, header, rows} of study.tables) node.append(element('p', {}, element('b', {}, title)), table(header, rows));
  for (const note of study.notes) node.append(element('p', {}, note));
  return node;
}

const {studies} = kvplan;
document.getElementById('subtitle').textContent =
  `${kvplan.program}, seed ${kvplan.seed}. ${kvplan.model ? `${kvplan.model}. ${kvplan.text}.` : 'Without a model.'}`;
for (const letter of ['C', 'E', 'R', '-']) {
  const count = studies.filter((s) => s.verdict === letter).length;
  document.getElementById('headline').append(element('div', {class: 'tile'},
    element('b', {}, String(count)), element('span', {}, `${words[letter]}: ${meaning[letter]}`)));
}
document.getElementById('overview').append(element('h2', {}, 'Verdicts'),
  element('p', {}, 'A verdict follows from the checks of a study: the claim as published, our explanation, and reference figures that do not count.'),
  table(['id', 'study', 'verdict', 'checks passed', 'source'], studies.map((s) => [
    element('a', {href: `#${s.id}`}, s.id), s.title, badge(s.verdict),
    `${s.checks.filter((c) => c.passed).length} of ${s.checks.length}`, s.source])));
document.getElementById('studies').append(element('h2', {}, 'Studies'), ...studies.map(drawStudy));

// A link into a closed study opens it.
const open = () => { const node = document.getElementById(location.hash.slice(1)); if (node?.tagName === 'DETAILS') node.open = true; };
addEventListener('hashchange', open);
open();
