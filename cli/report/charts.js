'use strict';
// What the report is made of: figures as text, page elements, charts (Chart.js) and maps.

// Text and numbers

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const sum = (values) => values.reduce((a, b) => a + b, 0);
const mean = (values) => sum(values) / values.length;
const whole = (x) => x.toLocaleString('en');
const fixed = (x, digits) => x.toFixed(digits);
const significant = (x, digits = 3) => {
  if (x === 0) return '0';
  return Math.abs(x) < 1e-4 ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
};
const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)}\u00a0%`;
const signedPercent = (x) => `${x < 0 ? '−' : '+'}${percent(Math.abs(x), 2)}`;
const percentRange = ({low, high}) => `${signedPercent(low).slice(0, -2)}\u00a0…\u00a0${signedPercent(high)}`;
const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? '' : 's'}`;
const shortHash = (sha256) => sha256?.slice(0, 12) ?? 'none';
const partOf = (part) => (part[0] === 0 && part[1] === 1 ? '' : `, part ${part[0]}–${part[1]}`);

/** 95 % interval of a mean KL, kept positive for logarithmic axes. */
const klInterval = ({mean: middle, standard_error: error}) => ({
  low: Math.max(middle - 1.96 * error, middle / 10), high: middle + 1.96 * error,
});

// Page elements

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Fills a section with a heading, an explanation and content; a section without content is removed. */
function section(id, heading, text, ...content) {
  const node = document.getElementById(id);
  if (content.length === 0) return node.remove();
  node.append(element('h2', {}, heading), element('p', {}, text), ...content);
}

const columns = (...children) => element('div', {class: 'columns'}, ...children);

/** Rows {cells, plan}, sorted by a click on a header of text; the region scrolls by keyboard. */
function table(header, rows, {label, ...attributes} = {}) {
  const body = element('tbody', {}, ...rows.map(({cells, plan}) =>
    element('tr', plan ? {class: 'plan'} : {}, ...cells.map((c) => element('td', {}, c)))));
  const titles = header.map((h) => element('th', {scope: 'col'}, h));
  if (rows.length > 1 && attributes.class !== 'facts') makeSortable(titles, body);
  return element('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': label ?? 'Table'},
    element('table', attributes, element('thead', {}, element('tr', {}, ...titles)), body));
}

// Logarithmic scales

const kMantissas = [1, 2, 5];
const isPowerOfTen = (x) => Math.abs(Math.log10(x) - Math.round(Math.log10(x))) < 1e-9;

/** The 1-2-5 numbers from the last one at or below `low` to the first one at or above `high`. */
function roundNumbers(low, high) {
  const numbers = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); ++e) {
    numbers.push(...kMantissas.map((m) => Number(`${m}e${e}`)));
  }
  const begin = numbers.findLastIndex((x) => x <= low), end = numbers.findIndex((x) => x >= high);
  return numbers.slice(begin, Math.max(end, begin + 1) + 1);
}

/** Limits and labels around positive values; only powers of ten are labelled when the range is long. */
function logScale(values) {
  const positive = values.filter((x) => x > 0);
  const numbers = positive.length ? roundNumbers(Math.min(...positive), Math.max(...positive)) : [0.1, 1];
  return {min: numbers[0], max: numbers.at(-1), marks: numbers.length > 10 ? numbers.filter(isPowerOfTen) : numbers};
}

// Charts. Colours are functions: they follow the theme when a chart is updated.

const charts = [];
Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;

const themed = (name) => () => css(name);

const axis = (title, more = {}) => ({
  title: {display: true, text: title, color: themed('--muted')}, grid: {color: themed('--line')},
  ticks: {color: themed('--muted'), maxRotation: 0}, ...more,
});

function logAxis(title, values) {
  const {min, max, marks} = logScale(values);
  return axis(title, {
    type: 'logarithmic', min, max, ticks: {color: themed('--muted'), autoSkip: false, callback: (v) => significant(v, 2)},
    afterBuildTicks: (scale) => { scale.ticks = marks.map((value) => ({value})); },
  });
}

const series = (label, data, colour, more = {}) => ({
  label, data, borderColor: themed(colour), backgroundColor: themed(colour), pointRadius: 2.5, borderWidth: 2, ...more,
});

/** Draws what a point carries beside x and y: `low` and `high` as a whisker, `name` beside it where there is room. */
const annotations = {
  id: 'annotations',
  afterDatasetsDraw(chart) {
    const {ctx, chartArea, scales} = chart;
    const points = chart.data.datasets.flatMap((dataset, d) => (chart.isDatasetVisible(d) ? chart.getDatasetMeta(d).data : [])
      .map(({x, y, options}, i) => ({...dataset.data[i], x, y, colour: options.borderColor})));
    const taken = points.filter((p) => p.name).map(({x, y}) => ({left: x - 6, right: x + 6, top: y - 6, bottom: y + 6}));
    ctx.save();
    ctx.font = `12px ${Chart.defaults.font.family}`;
    ctx.textBaseline = 'middle';
    for (const {x, y, low, high, name, colour} of points) {
      if (high !== undefined) {
        ctx.strokeStyle = colour;
        ctx.lineWidth = 1.5;
        const top = scales.y.getPixelForValue(high), bottom = scales.y.getPixelForValue(low);
        ctx.beginPath();
        for (const [x0, y0, x1, y1] of [[x, top, x, bottom], [x - 4, top, x + 4, top], [x - 4, bottom, x + 4, bottom]]) {
          ctx.moveTo(x0, y0);
          ctx.lineTo(x1, y1);
        }
        ctx.stroke();
      }
      if (!name) continue;
      const width = ctx.measureText(name).width;
      const place = [[x + 10, y], [x - 10 - width, y], [x - width / 2, y - 16], [x - width / 2, y + 16]]
        .map(([left, middle]) => ({left, right: left + width, top: middle - 6, bottom: middle + 6, middle}))
        .find((box) => box.left > chartArea.left && box.right < chartArea.right && !taken.some((other) =>
          box.left < other.right && box.right > other.left && box.top < other.bottom && box.bottom > other.top));
      if (!place) continue;
      taken.push(place);
      ctx.fillStyle = css('--ink');
      ctx.fillText(name, place.left, place.middle);
    }
    ctx.restore();
  },
};

function plot(title, type, data, {scales, tooltip = {}, tall = false}) {
  const canvas = element('canvas', {role: 'img', 'aria-label': `${title}; its values are in the table below`});
  charts.push(() => new Chart(canvas, {
    type, data, plugins: [annotations],
    options: {
      animation: false, maintainAspectRatio: false, interaction: {mode: 'nearest', intersect: false}, scales,
      plugins: {
        legend: {display: data.datasets.length > 1, align: 'start',
          labels: {color: themed('--ink'), usePointStyle: true, boxHeight: 7, sort: (a, b) => a.datasetIndex - b.datasetIndex}},
        tooltip: {callbacks: tooltip},
      },
    },
  }));
  return element('figure', {}, element('figcaption', {}, title), element('div', {class: tall ? 'plot tall' : 'plot'}, canvas),
    valuesOf(title, data, scales));
}

/** The chart's figures as a table, made when it is opened. */
function valuesOf(title, {labels, datasets}, {x, y}) {
  const figure = (value) => (typeof value === 'number' ? significant(value, 4) : String(value ?? '–'));
  const rows = () => datasets.flatMap((set) => set.data.map((d, i) => {
    const point = typeof d === 'object' && d !== null ? d : {x: labels[i], y: d};
    return {cells: [point.name ?? set.label, figure(point.x), figure(point.y), point.low === undefined ? '–' : `${figure(point.low)} … ${figure(point.high)}`]};
  }));
  const details = element('details', {class: 'values'}, element('summary', {}, 'Values'));
  details.addEventListener('toggle', () => {
    details.querySelector('.scroll')?.remove();
    if (details.open) details.append(table(['series', x.title.text, y.title.text || title, '95 % interval'], rows(), {label: `Values: ${title}`}));
  });
  return details;
}

/** Keys and values over the layers, joined by lines. */
function layerPlot(title, unit, sides, yAxis) {
  const datasets = [series('keys', sides.k, '--key'), series('values', sides.v, '--value', {pointStyle: 'rect'})];
  const y = yAxis ?? logAxis(unit, [...sides.k, ...sides.v]);
  return plot(title, 'line', {labels: sides.k.map((_, layer) => layer), datasets},
    {scales: {x: axis('layer', {grid: {display: false}}), y}, tooltip: {title: ([item]) => `layer ${item.label}`}});
}

// Maps: layers across, KV heads down

const channelsOf = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

/** WCAG 2 relative luminance. */
const luminance = (rgb) => sum(rgb.map((c, i) => {
  const s = c / 255;
  return [0.2126, 0.7152, 0.0722][i] * (s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4);
}));

/** Background and text colour of `share` (-1..1) of the map's largest value; differences below 0 take the colour of values. */
function mapColours(share) {
  const stops = (share < 0 ? ['--map-low', '--less-middle', '--less-high'] : ['--map-low', '--map-middle', '--map-high'])
    .map((name) => channelsOf(css(name)));
  const at = 2 * Math.min(Math.abs(share), 1), stop = Math.min(Math.floor(at), 1);
  const rgb = stops[stop].map((c, i) => Math.round(c + (stops[stop + 1][i] - c) * (at - stop)));
  // Above this luminance black text has the higher contrast; the lower of the two is 4.58 there.
  return `background:rgb(${rgb.join(' ')});color:${luminance(rgb) > 0.179 ? '#000000' : '#ffffff'}`;
}

/** Attributes of what is coloured by a share; the theme switch colours it anew. */
const coloured = (share) => ({'data-share': share, style: mapColours(share)});

/** rows[head][layer]: {value, text, title}; `means` is an optional row of cells below. Cells choose their layer and head (explore.js). */
function layerMap(title, rows, largest, means) {
  const cells = (row, head) => row.map(({value, text, title: tip}, layer) => element('td', {
    role: 'gridcell', tabindex: -1, 'data-layer': layer, ...(head === undefined ? {} : {'data-head': head}), 'data-tip': tip,
    'aria-label': `${tip}: ${text === '' ? 0 : text}`, ...coloured(largest ? value / largest : 0),
  }, text));
  const head = (text) => element('th', {scope: 'row'}, text);
  const layers = rows[0].length;
  const grid = element('table', {class: 'map', role: 'grid', 'aria-label': title, style: `min-width:${60 + 27 * layers}px`},
    element('colgroup', {}, element('col', {style: 'width:58px'})),
    element('thead', {}, element('tr', {}, element('th', {scope: 'col'}, 'layer'),
      ...rows[0].map((_, layer) => element('th', {scope: 'col'}, layer)))),
    element('tbody', {}, ...rows.map((row, h) => element('tr', {}, head(`head ${h}`), ...cells(row, h))),
      ...(means ? [element('tr', {class: 'mean'}, head('mean'), ...cells(means))] : [])));
  walkWithArrows(grid);
  return element('figure', {}, element('figcaption', {}, title), element('div', {class: 'scroll'}, grid));
}

function mapLegend(label, largest, steps) {
  const swatches = Array.from({length: steps + 1}, (_, i) => (largest * i) / steps);
  return element('div', {class: 'legend', 'aria-hidden': 'true'}, element('span', {}, label),
    ...swatches.map((v) => element('i', coloured(v / largest), String(v))));
}
