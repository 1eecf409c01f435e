'use strict';
// What every part of the page can be asked for: theme, tips on hover and focus, sorted tables, maps by keyboard.

// Theme

const dark = matchMedia('(prefers-color-scheme: dark)');
const kDark = {system: 'screen and (prefers-color-scheme: dark)', light: 'not all', dark: 'screen'};
const darkRule = [...document.styleSheets[0].cssRules].find((rule) => rule.media?.mediaText === kDark.system);
const themeChoice = choice('Theme', ['system', 'light', 'dark'].map((name) => [name, name]), setTheme);
document.getElementById('theme').append(themeChoice);

function setTheme(name) {
  darkRule.media.mediaText = kDark[name];
  document.documentElement.style.colorScheme = name === 'system' ? 'light dark' : name;
  repaint();
}

/** Colours what does not follow the style sheet by itself: maps and canvases. */
function repaint() {
  for (const node of document.querySelectorAll('[data-share]')) node.style.cssText = mapColours(Number(node.dataset.share));
  for (const canvas of document.querySelectorAll('canvas')) Chart.getChart(canvas)?.update('none');
}

dark.addEventListener('change', repaint);
// Paper is white whatever the screen shows.
addEventListener('beforeprint', () => {
  darkRule.media.mediaText = kDark.light;
  repaint();
});
addEventListener('afterprint', () => setTheme(themeChoice.control.value));

/** A labelled list of [value, text]; the label's `control` is the select element. */
function choice(label, options, chosen) {
  const control = element('select', {}, ...options.map(([value, text]) => element('option', {value}, text)));
  control.addEventListener('change', () => chosen(control.value));
  return element('label', {}, label, control);
}

// Tips

const tip = document.getElementById('tip');
let tipped = null;

function showTip({target}) {
  tipped = target.closest?.('[data-tip]');
  tip.textContent = tipped?.dataset.tip ?? '';
  tip.hidden = !tipped;
  placeTip();
}

/** Above its element where there is room, and within the window. */
function placeTip() {
  if (tip.hidden) return;
  const at = tipped.getBoundingClientRect(), {offsetWidth: width, offsetHeight: height} = tip;
  tip.style.left = `${Math.max(4, Math.min(at.left + at.width / 2 - width / 2, innerWidth - width - 4))}px`;
  tip.style.top = `${at.top > height + 12 ? at.top - height - 6 : at.bottom + 6}px`;
}

function hideTip() {
  tip.hidden = true;
}

document.addEventListener('mouseover', showTip);
document.addEventListener('focusin', showTip);
document.addEventListener('focusout', hideTip);
document.addEventListener('scroll', placeTip, true);
document.addEventListener('keydown', ({key}) => { if (key === 'Escape') hideTip(); });

// Sorted tables

/** The number that a cell begins with, NaN without one. */
const leadingNumber = (text) => Number(text.replaceAll(',', '').replace('−', '-').match(/^[-+]?\d+(\.\d+)?(e[-+]?\d+)?/)?.[0] ?? NaN);
const isMissing = (text) => text === '' || text === '–';

/** Headers of text become buttons: ascending, descending, as it was. Columns of numbers sort as such; what is missing comes last. */
function makeSortable(headers, body) {
  const original = [...body.rows];
  const textOf = (row, column) => row.cells[column].textContent;
  headers.forEach((header, column) => {
    if (header.children.length) return;
    const button = element('button', {type: 'button'}, ...header.childNodes);
    header.append(button);
    button.addEventListener('click', () => {
      const next = {ascending: 'descending', descending: null}[header.getAttribute('aria-sort')];
      const order = next === undefined ? 'ascending' : next;
      headers.forEach((h) => h.removeAttribute('aria-sort'));
      if (!order) return body.append(...original);
      header.setAttribute('aria-sort', order);
      const present = original.filter((row) => !isMissing(textOf(row, column)));
      const numeric = present.every((row) => !Number.isNaN(leadingNumber(textOf(row, column))));
      const compare = numeric ? (a, b) => leadingNumber(textOf(a, column)) - leadingNumber(textOf(b, column)) :
        (a, b) => textOf(a, column).localeCompare(textOf(b, column), 'en', {numeric: true});
      present.sort(order === 'ascending' ? compare : (a, b) => compare(b, a));
      body.append(...present, ...original.filter((row) => isMissing(textOf(row, column))));
    });
  });
}

// Maps

/** One cell of a grid is in the tab order; arrows, Home and End move on, Enter and Space choose. */
function walkWithArrows(grid) {
  const rows = [...grid.tBodies[0].rows].map((row) => [...row.querySelectorAll('[role=gridcell]')]);
  rows[0][0].tabIndex = 0;
  const place = (cell) => rows.map((row, r) => [r, row.indexOf(cell)]).find(([, c]) => c >= 0);
  const choose = (cell) => chooseCell(Number(cell.dataset.layer), cell.dataset.head === undefined ? undefined : Number(cell.dataset.head));
  grid.addEventListener('focusin', ({target}) => {
    for (const cell of rows.flat()) cell.tabIndex = cell === target ? 0 : -1;
  });
  grid.addEventListener('click', ({target}) => {
    const cell = target.closest('[role=gridcell]');
    if (cell) choose(cell);
  });
  grid.addEventListener('keydown', (event) => {
    const at = place(event.target);
    if (!at) return;
    const [r, c] = at;
    const moves = {ArrowRight: [r, c + 1], ArrowLeft: [r, c - 1], ArrowDown: [r + 1, c], ArrowUp: [r - 1, c], Home: [r, 0], End: [r, rows[r].length - 1]};
    if (event.key === 'Enter' || event.key === ' ') choose(event.target);
    else if (moves[event.key]) rows[moves[event.key][0]]?.[moves[event.key][1]]?.focus();
    else return;
    event.preventDefault();
  });
}
