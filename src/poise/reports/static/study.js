// The page of `poise study`: recomputes objectives over the pool of completions, and draws every chart.
//
// The equations are those of objectives.py, RewardScale and selection.py, in double precision; tests/test_study_page.py
// compares the two. What a reader chose lives in the address after `#`, so a link brings it back. Text reaches the page
// as text nodes only.
'use strict';

(() => {
  const STUDY = embedded('study');
  const POOL = embedded('pool');
  const COLORS = 8; // --series-0 … of the style sheet
  const DASHES = ['', '6 3', '8 3 2 3', '2 3'];
  const WINDOW = 3; // PPO steps that one point of a smoothed line averages, as in plots.py

  function embedded(id) {
    const element = document.getElementById(id);
    return element ? JSON.parse(element.textContent) : null;
  }

  // ---- from heads to one reward ----

  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const mean = (values) => sum(values) / values.length;
  const lowest = (values) => values.reduce((low, value) => Math.min(low, value), Infinity);

  function nominal(heads, stds) {
    let best = 0;
    if (stds) for (let k = 1; k < stds.length; k++) if (stds[k] < stds[best]) best = k;
    return heads[best];
  }

  function disagreement(heads) {
    const center = mean(heads);
    return Math.sqrt(mean(heads.map((head) => (head - center) ** 2)));
  }

  function quantile(heads, level) {
    const sorted = [...heads].sort((a, b) => a - b);
    const position = level * (sorted.length - 1);
    const below = Math.floor(position);
    const above = Math.min(below + 1, sorted.length - 1);
    return sorted[below] + (position - below) * (sorted[above] - sorted[below]);
  }

  function softMin(heads, temperature) {
    const least = lowest(heads); // taken out of the exponential, which would overflow
    return least - temperature * Math.log(mean(heads.map((head) => Math.exp((least - head) / temperature))));
  }

  function randomHead(heads) {
    const scrambled = 1000 * sum(heads);
    const remainder = scrambled - heads.length * Math.floor(scrambled / heads.length);
    return heads[Math.min(Math.max(Math.floor(remainder), 0), heads.length - 1)];
  }

  // of: one completion's head means, their stds (or null), the parameter.
  // ofMoments: the same from the mean and std over heads alone, where these are all that the page holds.
  const OBJECTIVES = {
    nominal: { label: 'nominal: the head with the lowest std', of: nominal },
    worst_case: { label: 'worst case: the lowest head', of: lowest },
    tradeoff: {
      label: 'trade-off: λ nominal + (1 − λ) worst case',
      parameter: { label: 'λ, weight of the nominal head', low: 0, high: 1, step: 0.05, start: 0.4 },
      of: (heads, stds, weight) => weight * nominal(heads, stds) + (1 - weight) * lowest(heads),
    },
    mean: { label: 'mean of the heads', of: mean, ofMoments: (average) => average },
    median: { label: 'median head', of: (heads) => quantile(heads, 0.5) },
    quantile: {
      label: 'quantile of the heads',
      parameter: { label: 'level', low: 0, high: 1, step: 0.05, start: 0.25 },
      of: (heads, _, level) => quantile(heads, level),
    },
    uncertainty_weighted: {
      label: 'uncertainty-weighted: mean − c · variance',
      parameter: { label: 'c, in 1/reward', low: 0, high: 5, step: 0.1, start: 0.5 },
      of: (heads, _, coefficient) => mean(heads) - coefficient * disagreement(heads) ** 2,
      ofMoments: (average, std, coefficient) => average - coefficient * std ** 2,
    },
    lower_confidence: {
      label: 'lower confidence bound: mean − c · std',
      parameter: { label: 'c', low: 0, high: 5, step: 0.1, start: 1 },
      of: (heads, _, coefficient) => mean(heads) - coefficient * disagreement(heads),
      ofMoments: (average, std, coefficient) => average - coefficient * std,
    },
    soft_min: {
      label: 'soft minimum of the heads',
      parameter: { label: 't, temperature in reward units', low: 0.05, high: 5, step: 0.05, start: 1 },
      of: (heads, _, temperature) => softMin(heads, temperature),
    },
    random_head: { label: 'random head (control)', of: randomHead },
    constant: { label: 'constant (control)', of: () => 0 },
  };

  const fits = (objective, reward) => reward.kind === 'heads' || 'ofMoments' in OBJECTIVES[objective];

  function combined(reward, objective, parameter) {
    const { of, ofMoments } = OBJECTIVES[objective];
    if (reward.kind === 'moments') return reward.mean.map((average, i) => ofMoments(average, reward.std[i], parameter));
    const size = reward.numHeads;
    return Float64Array.from({ length: reward.mean.length / size }, (_, i) => {
      const heads = reward.mean.slice(i * size, (i + 1) * size);
      return of(heads, reward.std && reward.std.subarray(i * size, (i + 1) * size), parameter);
    });
  }

  // RewardScale: zero mean and unit sample std over the initial policy's completions; a constant keeps scale 1.
  function scaled(rewards) {
    const center = mean(rewards);
    const std = Math.sqrt(sum(rewards.map((reward) => (reward - center) ** 2)) / (rewards.length - 1));
    return rewards.map((reward) => (reward - center) / (std > 1e-6 ? std : 1));
  }

  // ---- best-of-n and tilting (selection.py) ----

  // Of N completions in rising order, the chance of each to be the best of n drawn: C(i - 1, n - 1) / C(N, n).
  function bestWeights(n, size) {
    const weights = new Float64Array(size);
    weights[size - 1] = n / size;
    for (let i = size; i > n; i--) weights[i - 2] = (weights[i - 1] * (i - n)) / (i - 1);
    return weights;
  }

  // Each value replaced by the mean of those of equal key, in which the keys rise: ties are broken at random.
  function sharedByTies(values, keys) {
    const shared = [...values];
    for (let start = 0, end; start < keys.length; start = end) {
      end = start + 1;
      while (end < keys.length && keys[end] === keys[start]) end++;
      if (end > start + 1) shared.fill(mean(values.slice(start, end)), start, end);
    }
    return shared;
  }

  function bestOfN(prompts, gold, sizes) {
    const orders = prompts.map((proxy) => [...proxy.keys()].sort((a, b) => proxy[a] - proxy[b]));
    const inOrder = (scores) => orders.map((order, p) => order.map((i) => scores[p][i]));
    const proxies = inOrder(prompts);
    const golds = inOrder(gold).map((scores, p) => sharedByTies(scores, proxies[p]));
    return sizes.map((n) => {
      const weights = bestWeights(n, prompts[0].length);
      const expected = (scores) => mean(scores.map((ordered) => sum(ordered.map((score, rank) => weights[rank] * score))));
      return { at: n, kl: Math.log(n) - (n - 1) / n, proxy: expected(proxies), gold: expected(golds) };
    });
  }

  function tilted(prompts, gold, klCoefs) {
    return klCoefs.map((klCoef) => {
      // inverse: of the effective sample size, mean over prompts; the error of the pool's KL goes with it.
      const point = { at: klCoef, kl: 0, proxy: 0, gold: 0, inverse: 0 };
      prompts.forEach((proxy, p) => {
        const top = proxy.reduce((high, value) => Math.max(high, value), -Infinity);
        const weights = proxy.map((value) => Math.exp((value - top) / klCoef));
        const total = sum(weights);
        weights.forEach((unnormalized, i) => {
          const weight = unnormalized / total;
          if (weight > 0) point.kl += (weight * Math.log(weight * proxy.length)) / prompts.length;
          point.proxy += (weight * proxy[i]) / prompts.length;
          point.gold += (weight * gold[p][i]) / prompts.length;
          point.inverse += (weight * weight) / prompts.length;
        });
      });
      return point;
    });
  }

  // A tilted curve up to the point before the first at which the pool is worth too few samples a prompt.
  function reached(points) {
    const short = points.findIndex(({ inverse }) => 1 / inverse < POOL.min_samples);
    return short < 0 ? points : points.slice(0, short);
  }

  // ---- the pool ----

  const float64 = (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  };
  const byPrompt = (values) =>
    Array.from({ length: POOL.num_prompts }, (_, p) => values.subarray(p * POOL.per_prompt, (p + 1) * POOL.per_prompt));

  const remembered = new Map();
  function once(key, compute) {
    if (!remembered.has(key)) remembered.set(key, compute());
    return remembered.get(key);
  }

  const poolGold = () => once('gold', () => byPrompt(float64(POOL.gold)));
  const rewardOf = (noise, seed, name) =>
    once(`reward ${noise} ${seed} ${name}`, () => {
      const { kind, num_heads: numHeads, mean: means, std } = POOL.rewards[noise][seed][name];
      return { kind, numHeads, mean: float64(means), std: std ? float64(std) : null };
    });

  // Curves of one choice {reward, objective, parameter, noise}: of every seed, and their mean.
  function curvesOf(choice) {
    const seeds = POOL.rewards[choice.noise].map((_, seed) => {
      const reward = rewardOf(choice.noise, seed, choice.reward);
      const proxy = byPrompt(scaled(combined(reward, choice.objective, choice.parameter)));
      return {
        best_of_n: bestOfN(proxy, poolGold(), POOL.sizes),
        tilted: tilted(proxy, poolGold(), POOL.kl_coefs),
      };
    });
    const averaged = (policy) =>
      seeds[0][policy].map(({ at }, i) => {
        const points = seeds.map((seed) => seed[policy][i]);
        const golds = points.map((point) => point.gold);
        return {
          at,
          kl: mean(points.map((point) => point.kl)),
          proxy: mean(points.map((point) => point.proxy)),
          gold: mean(golds),
          inverse: mean(points.map((point) => point.inverse)),
          low: Math.min(...golds),
          high: Math.max(...golds),
        };
      });
    return {
      mean: { best_of_n: averaged('best_of_n'), tilted: reached(averaged('tilted')) },
      seeds: seeds.map((seed) => ({ ...seed, tilted: reached(seed.tilted) })),
    };
  }

  // ---- elements and numbers ----

  const $ = (id) => document.getElementById(id);

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const missing = (value) => value === null || value === undefined || Number.isNaN(value);
  const number = (value, digits = 2) => {
    if (missing(value)) return '–';
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace('-', '') : text.replace('-', '−'); // no −0.00
  };
  const signed = (value, digits = 2) => (Number(value?.toFixed(digits)) > 0 ? '+' : '') + number(value, digits);
  const capital = (text) => text[0].toUpperCase() + text.slice(1);
  const short = (value) => String(Number(value.toPrecision(6))).replace('-', '−');
  const root = (kl) => (missing(kl) ? null : Math.sqrt(Math.max(kl, 0)));

  function option(value, label, disabled = false) {
    const made = element('option', { value }, label);
    made.disabled = disabled;
    return made;
  }

  function fill(select, options, value) {
    select.replaceChildren(...options);
    select.value = value;
  }

  // ---- charts ----

  const specs = new Map(); // what each host shows, to draw it anew at another width
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) if (specs.get(target)?.drawnAt !== target.clientWidth) draw(target);
  });

  // spec: {title, description, x, series, domain?, marks?, level?}; a series is
  // {style, solid?, kind: 'thin' | 'thick' | 'points' | 'end', points: [[x, y, tip?]], band?: [[x, low, high]]}.
  function chart(host, spec) {
    const known = specs.has(host);
    specs.set(host, spec);
    draw(host);
    if (!known) observer.observe(host);
  }

  function charts(grid, wanted) {
    while (grid.children.length < wanted.length) grid.append(element('div', { class: 'chart' }));
    while (grid.children.length > wanted.length) {
      observer.unobserve(grid.lastChild);
      specs.delete(grid.lastChild);
      grid.lastChild.remove();
    }
    wanted.forEach((spec, i) => chart(grid.children[i], spec));
  }

  function ticks(low, high, about) {
    const rough = (high - low) / about;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const first = Math.ceil(low / step - 1e-9);
    const last = Math.floor(high / step + 1e-9);
    const count = Math.max(last - first + 1, 0);
    return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }

  function extent(series, axis) {
    const values = series.flatMap(({ points, band = [] }) => [
      ...points.map((point) => point[axis]),
      ...band.flatMap(([x, low, high]) => (axis ? [low, high] : [x])),
    ]);
    const known = values.filter((value) => !missing(value));
    return known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
  }

  function padded([low, high], share = 0.06) {
    const room = high > low ? (high - low) * share : Math.max(Math.abs(high), 1) * 0.1;
    return [low - room, high + room];
  }

  function draw(host) {
    const spec = specs.get(host);
    spec.drawnAt = host.clientWidth;
    const width = Math.max(host.clientWidth, 200);
    const height = Math.round(Math.min(Math.max(width * 0.62, 170), 250));
    const [left, right, top, bottom] = [46, 10, 8, 36];
    const levels = missing(spec.level) ? [] : [spec.level];
    const [x0, x1] = spec.xDomain ?? [Math.min(0, extent(spec.series, 0)[0]), padded(extent(spec.series, 0), 0.03)[1]];
    const [y0, y1] = padded(spec.yDomain ?? extent([...spec.series, { points: levels.map((y) => [0, y]) }], 1));
    const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
    const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
    const at = (value) => value.toFixed(1);

    const picture = svg('svg', {
      viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${spec.title}. ${spec.description ?? ''}`.trim(),
    });
    for (const value of ticks(y0, y1, 5)) {
      picture.append(
        svg('line', { class: 'grid', x1: left, x2: width - right, y1: at(y(value)), y2: at(y(value)) }),
        svg('text', { x: left - 6, y: at(y(value) + 4), 'text-anchor': 'end' }, short(value)),
      );
    }
    for (const value of ticks(x0, x1, Math.max(Math.round(width / 75), 3))) {
      picture.append(
        svg('line', { class: 'grid', x1: at(x(value)), x2: at(x(value)), y1: top, y2: height - bottom }),
        svg('text', { x: at(x(value)), y: height - bottom + 15, 'text-anchor': 'middle' }, short(value)),
      );
    }
    picture.append(svg('text', { x: (left + width - right) / 2, y: height - 4, 'text-anchor': 'middle' }, spec.x));
    for (const level of levels) {
      picture.append(svg('line', { class: 'level', x1: left, x2: width - right, y1: at(y(level)), y2: at(y(level)) }));
    }
    (spec.marks ?? []).forEach((mark, i) => {
      const place = at(x(mark.x));
      if (i === 0) picture.append(svg('line', { class: 'alarm', x1: place, x2: place, y1: top, y2: height - bottom }));
      const triangle = svg('path', { class: 'alarm', d: `M${place} ${top + 7}l-4 -7h8z` });
      triangle.append(svg('title', {}, mark.tip));
      picture.append(triangle);
    });
    for (const series of spec.series) picture.append(drawSeries(series, x, y, at));
    host.replaceChildren(element('p', { class: 'chart-title' }, spec.title), picture);
  }

  // Two arms of one color, further down the list, have different dashes.
  const dashOf = (style) => DASHES[(style + Math.floor(style / COLORS)) % DASHES.length];

  function drawSeries({ style, solid, kind, points, band = [] }, x, y, at) {
    const group = svg('g', { class: `series-${style % COLORS} ${kind}` });
    const filled = band.filter((row) => !row.some(missing));
    if (kind === 'end') {
      for (const [px, low, high] of filled) {
        group.append(svg('path', { class: 'line', d: `M${at(x(px))} ${at(y(low))}V${at(y(high))}` }));
      }
    } else if (filled.length) {
      const edge = (column) => filled.map((row) => `${at(x(row[0]))} ${at(y(row[column]))}`);
      group.append(svg('path', { class: 'band', d: `M${[...edge(1), ...edge(2).reverse()].join('L')}Z` }));
    }
    if (kind === 'thin' || kind === 'thick') {
      let pen = 'M'; // a gap lifts it
      let path = '';
      for (const [px, py] of points) {
        if (missing(px) || missing(py)) pen = 'M';
        else {
          path += `${pen}${at(x(px))} ${at(y(py))}`;
          pen = 'L';
        }
      }
      group.append(svg('path', { class: 'line', d: path, 'stroke-dasharray': solid ? '' : dashOf(style) }));
    }
    if (kind !== 'thin') {
      const radius = { points: 2, thick: 3, end: 4.5 }[kind];
      for (const [px, py, tip] of points) {
        if (missing(px) || missing(py) || (kind === 'thick' && !tip)) continue;
        const dot = svg('circle', { cx: at(x(px)), cy: at(y(py)), r: radius });
        if (tip) dot.append(svg('title', {}, tip));
        group.append(dot);
      }
    }
    return group;
  }

  // A short line in a series' color and dash, for legends.
  function sample(style) {
    const line = svg('line', { class: 'line', x1: 0, x2: 26, y1: 6, y2: 6, 'stroke-dasharray': dashOf(style) });
    const name = `sample thick series-${style % COLORS}`;
    return svg('svg', { class: name, viewBox: '0 0 26 12', 'aria-hidden': 'true' }, line);
  }

  // ---- what the reader chose, in the address ----

  const state = {};
  const KEYS = [
    'reward', 'objective', 'parameter', 'noise', 'curves_noise', 'curves_sort', 'curves_order',
    'arms_noise', 'arms_sort', 'arms_order', 'run', 'run_arm',
  ];

  function readState() {
    // An anchor of the page is no state: it leaves the choice as it is.
    const text = location.hash.slice(1);
    if (text && !text.includes('=')) return;
    const given = new URLSearchParams(text);
    for (const key of KEYS) state[key] = given.get(key) ?? '';
    state.keep = given.getAll('keep');
    const extra = STUDY.arms.filter((arm) => arm.extra).map((arm) => arm.name);
    state.hide = new Set(given.has('hide') ? given.get('hide').split(',') : extra);
    state.hideIsChosen = given.has('hide');
  }

  function writeState() {
    const chosen = new URLSearchParams();
    for (const key of KEYS) if (state[key] !== '') chosen.set(key, state[key]);
    for (const kept of state.keep) chosen.append('keep', kept);
    if (state.hideIsChosen) chosen.set('hide', [...state.hide].join(','));
    history.replaceState(null, '', `#${chosen}`);
  }

  // ---- explore ----

  const noiseLabel = (name) => STUDY.noises.find((noise) => noise.name === name)?.label ?? name;
  const firstKnown = (wanted, known) => (known.includes(wanted) ? wanted : known[0]);

  // A choice that the pool can answer, whatever the address asks for.
  function checked({ reward, objective, parameter, noise }) {
    const choice = { noise: firstKnown(noise, Object.keys(POOL.rewards)) };
    const rewards = POOL.rewards[choice.noise][0];
    choice.reward = rewards[reward] ? reward : rewards.brme ? 'brme' : Object.keys(rewards)[0];
    const usable = Object.keys(OBJECTIVES).filter((name) => fits(name, rewards[choice.reward]));
    const usual = rewards[choice.reward].kind === 'moments' ? 'lower_confidence' : 'tradeoff';
    choice.objective = usable.includes(objective) ? objective : usual;
    const range = OBJECTIVES[choice.objective].parameter;
    const given = parameter === '' || parameter === undefined ? NaN : Number(parameter);
    const value = objective === choice.objective && Number.isFinite(given) ? given : range?.start;
    choice.parameter = range ? Math.min(Math.max(value, range.low), range.high) : null;
    return choice;
  }

  const keyOf = ({ reward, objective, parameter, noise }) => [reward, objective, parameter ?? '', noise].join(',');
  function choiceOf(key) {
    const [reward, objective, parameter, noise] = key.split(',');
    return checked({ reward, objective, parameter, noise });
  }
  const nameOf = ({ reward, objective, parameter, noise }) =>
    `${objective}${parameter === null ? '' : `(${short(parameter)})`} of ${reward}, ${noiseLabel(noise)}`;

  function showExplore() {
    const choice = checked(state);
    Object.assign(state, choice, { parameter: choice.parameter ?? '' });
    const rewards = POOL.rewards[choice.noise][0];
    const unfit = (name) => !fits(name, rewards[choice.reward]);
    const rewardOptions = Object.keys(rewards).map((name) => option(name, POOL.reward_labels[name] ?? name));
    const objectiveOptions = Object.entries(OBJECTIVES).map(([name, { label }]) => option(name, label, unfit(name)));
    fill($('reward'), rewardOptions, choice.reward);
    fill($('objective'), objectiveOptions, choice.objective);
    fill($('noise'), Object.keys(POOL.rewards).map((name) => option(name, noiseLabel(name))), choice.noise);
    showParameter(choice);
    drawExplore(choice);
  }

  function showParameter({ objective, parameter }) {
    const range = OBJECTIVES[objective].parameter;
    $('parameter-field').hidden = !range;
    if (!range) return;
    $('parameter-label').textContent = range.label;
    for (const input of [$('parameter-range'), $('parameter')]) {
      input.min = range.low;
      input.max = range.high;
      input.step = input.type === 'range' ? range.step : 'any';
      if (document.activeElement !== input) input.value = parameter; // what is being typed is not taken away
    }
  }

  function drawExplore(choice) {
    const current = keyOf(choice);
    const keys = [current, ...state.keep.map((key) => keyOf(choiceOf(key)))];
    const shown = [...new Set(keys)].map((key, style) => {
      const asked = choiceOf(key);
      return { key, style, name: nameOf(asked), ...once(`curves ${key}`, () => curvesOf(asked)) };
    });
    // Every position of a slider would stay in memory.
    for (const key of remembered.keys()) {
      if (key.startsWith('curves ') && !keys.includes(key.slice('curves '.length))) remembered.delete(key);
    }

    const kept = shown.slice(1);
    $('kept').replaceChildren(
      element('li', {}, sample(0), shown[0].name),
      ...kept.map(({ key, style, name }) => {
        const button = element('button', { type: 'button', 'aria-label': `Remove ${name}` }, 'remove');
        button.addEventListener('click', () => {
          state.keep = state.keep.filter((other) => keyOf(choiceOf(other)) !== key);
          changed(showExplore);
          $('keep').focus(); // the button that had it is gone
        });
        return element('li', {}, sample(style), `${name} `, button);
      }),
    );

    const policies = [['best_of_n', 'Best-of-n'], ['tilted', 'Tilted']];
    charts($('explore-charts'), policies.flatMap(([policy, title]) =>
      [['gold', 'gold'], ['proxy', 'proxy (std of the initial policy)']].map(([quantity, label]) => ({
        title: `${title}: ${label}`,
        description: 'One line for each choice; the numbers are in the table below.',
        x: '√KL',
        level: quantity === 'gold' ? POOL.initial_gold : 0,
        series: [
          ...shown.flatMap(({ style, seeds }) => seeds.map((seed) => ({
            style,
            kind: 'thin',
            points: seed[policy].map((point) => [root(point.kl), point[quantity]]),
          }))),
          ...shown.map(({ style, name, mean: average }) => ({
            style,
            kind: 'thick',
            points: average[policy].map((point) => [root(point.kl), point[quantity], tipOf(name, policy, point)]),
          })),
        ],
      }))));

    $('explore-said').textContent = saidOf(shown[0]);
    for (const [policy] of policies) {
      const table = $(`numbers-${policy}`);
      for (const body of [...table.tBodies]) body.remove();
      table.append(...shown.map((curve) => numbers(curve, policy)));
    }
  }

  const tipOf = (name, policy, { at, kl, proxy, gold }) =>
    `${name}\n${policy === 'tilted' ? 'β' : 'n'} = ${at}: KL ${number(kl)}, proxy ${signed(proxy)}, gold ${signed(gold)}`;

  function saidOf({ name, seeds, mean: average }) {
    const points = average.best_of_n;
    const [last, peak] = [points.at(-1), points.reduce((best, point) => (point.gold > best.gold ? point : best))];
    const ends = `${signed(last.low)} to ${signed(last.high)}`;
    const range = seeds.length > 1 ? ` (${ends} over ${seeds.length} reward models)` : '';
    return `${name}: the best of ${last.at} has gold ${signed(last.gold)}${range} and proxy ${signed(last.proxy)}; `
      + `the initial policy has ${signed(points[0].gold)}. Gold is highest at n = ${peak.at}, ${signed(peak.gold)}.`;
  }

  // Rows of one curve; `data-` attributes have every digit.
  function numbers({ key, style, name, mean: average }, policy) {
    const exact = (quantity, value, text) => element('td', { 'data-quantity': quantity, 'data-value': value }, text);
    return element('tbody', { 'data-curve': key },
      element('tr', {}, element('th', { scope: 'rowgroup', colspan: 5, class: 'name' }, sample(style), name)),
      ...average[policy].map((point) => element('tr', { 'data-at': point.at },
        element('th', { scope: 'row' }, String(point.at)),
        exact('kl', point.kl, number(point.kl)),
        exact('proxy', point.proxy, signed(point.proxy)),
        exact('gold', point.gold, signed(point.gold)),
        element('td', { 'data-low': point.low, 'data-high': point.high },
          `${signed(point.low)} to ${signed(point.high)}`))));
  }

  function changed(show) {
    show();
    writeState();
  }

  function startExplore() {
    for (const key of ['reward', 'objective', 'noise']) {
      $(key).addEventListener('change', () => {
        state[key] = $(key).value;
        if (key === 'objective') state.parameter = '';
        changed(showExplore);
      });
    }
    for (const input of [$('parameter-range'), $('parameter')]) {
      input.addEventListener('input', () => {
        if (input.value === '' || !input.validity.valid) return;
        state.parameter = input.value;
        changed(showExplore);
      });
    }
    $('parameter').addEventListener('change', () => {
      $('parameter').value = state.parameter; // what is out of range falls back to the last that was not
    });
    $('keep').addEventListener('click', () => {
      const key = keyOf(checked(state));
      if (!state.keep.includes(key)) state.keep.push(key);
      changed(showExplore);
    });
  }

  // ---- curves of the study ----

  const styleOf = (name) => STUDY.arms.findIndex((arm) => arm.name === name);
  const visible = (arms) => arms.filter((arm) => !state.hide.has(arm.name));

  const boundsOf = (quantity, point) => [point[`${quantity}_low`], point[`${quantity}_high`]];
  function studyTip(name, quantity, point) {
    const [low, high] = boundsOf(quantity, point);
    const at = point.n === undefined ? `β = ${point.kl_coef}` : `n = ${point.n}`;
    return `${name}, ${at}: KL ${number(point.kl)}, ${quantity} ${signed(point[quantity])} (${signed(low)} to ${signed(high)})`;
  }

  function showCurves() {
    for (const policy of ['best_of_n', 'tilted']) {
      const grid = $(`curves-${policy}`);
      if (!grid) continue;
      const noises = STUDY.noises.filter(({ name }) => STUDY.best_of_n[name]);
      rowsOfCharts(grid, noises, (quantity, { name, label }) => {
        const arms = visible(STUDY.arms).filter((arm) => STUDY.best_of_n[name][arm.name]?.[policy]);
        const found = arms.map((arm) => STUDY.best_of_n[name][arm.name]);
        return {
          title: `${capital(quantity)}, ${label}`,
          level: quantity === 'gold' ? found[0]?.initial_gold : 0,
          series: arms.flatMap((arm, i) => {
            const [style, points, law] = [styleOf(arm.name), found[i][policy], found[i].laws[policy]];
            return [
              ...(law && quantity === 'gold'
                ? [{ style, kind: 'thin', points: points.map((point, at) => [root(point.kl), law[at]]) }] : []),
              {
                style,
                kind: 'thick',
                points: points.map((point) => [root(point.kl), point[quantity], studyTip(arm.name, quantity, point)]),
                band: points.map((point) => [root(point.kl), ...boundsOf(quantity, point)]),
              },
            ];
          }),
        };
      });
    }
    if ($('curves-ppo')) {
      const noises = STUDY.noises.filter(({ name }) => STUDY.runs.some((run) => run.noise === name));
      rowsOfCharts($('curves-ppo'), noises, (quantity, { name, label }) => ({
        title: `${capital(quantity)}, ${label}`,
        level: quantity === 'proxy' ? 0 : null,
        series: visible(STUDY.arms).filter((arm) => STUDY.trained[name][arm.name]).flatMap((arm) => {
          const style = styleOf(arm.name);
          const lines = STUDY.runs.filter((run) => run.noise === name)
            .flatMap((run) => run.arms.filter((other) => other.name === arm.name))
            .map((one) => [smooth(one.kl), smooth(one[quantity])]);
          const thin = ([kl, values]) => ({ style, kind: 'thin', points: kl.map((at, i) => [root(at), values[i]]) });
          const average = STUDY.trained[name][arm.name];
          const at = average.kl.map(root);
          return [
            ...(lines.length > 1 ? lines.map(thin) : []),
            {
              style,
              kind: 'thick',
              points: at.map((x, i) => [x, average[quantity][i]]),
              band: at.map((x, i) => [x, average[`${quantity}_low`][i], average[`${quantity}_high`][i]]),
            },
          ];
        }),
      }));
    }
    if ($('curves-checkpoints')) showCheckpoints();
  }

  // One row of charts for each quantity, with one y axis for the whole row.
  function rowsOfCharts(grid, noises, specOf) {
    grid.style.setProperty('--columns', noises.length === 1 ? 2 : noises.length); // of one noise, gold beside proxy
    const rows = ['gold', 'proxy'].map((quantity) => noises.map((noise) => specOf(quantity, noise)));
    for (const row of rows) {
      const everything = row.flatMap(({ series }) => series);
      const levels = row.filter(({ level }) => !missing(level)).map(({ level }) => ({ points: [[0, level]] }));
      for (const spec of row) spec.yDomain = extent([...everything, ...levels], 1);
    }
    const description = 'One line for each arm; their final figures are in the tables.';
    charts(grid, rows.flat().map((spec) => ({ ...spec, x: '√KL', description })));
  }

  // Centered moving average; over fewer at the ends and beside gaps.
  function smooth(values) {
    const half = Math.floor(WINDOW / 2);
    return values.map((_, i) => {
      const near = values.slice(Math.max(i - half, 0), i + half + 1).filter((value) => !missing(value));
      return near.length ? mean(near) : null;
    });
  }

  function showCheckpoints() {
    charts($('curves-checkpoints'), STUDY.checkpoints.map(({ task, noise_label: label, arms }) => ({
      title: `${capital(task)}, ${label}`,
      x: 'PPO step',
      series: visible(STUDY.arms).filter(({ name }) => arms[name]).map(({ name }) => {
        const { steps, mean: scores, interval } = arms[name];
        const bounds = interval.map((one) => one ?? [null, null]); // of a single reward model there is none
        const between = ([low, high]) => (missing(low) ? '' : ` (${number(low, 3)} to ${number(high, 3)})`);
        const tip = (i) => `${name}, step ${steps[i]}: ${number(scores[i], 3)}${between(bounds[i])}`;
        return {
          style: styleOf(name),
          kind: 'thick',
          points: steps.map((step, i) => [step, scores[i], tip(i)]),
          band: steps.map((step, i) => [step, ...bounds[i]]),
        };
      }),
    })));
  }

  function startLegends() {
    for (const legend of document.querySelectorAll('[data-legend]')) {
      const names = JSON.parse(legend.dataset.legend);
      for (const arm of STUDY.arms.filter(({ name }) => names.includes(name))) {
        const box = element('input', { type: 'checkbox', 'data-arm': arm.name });
        box.addEventListener('change', () => {
          if (box.checked) state.hide.delete(arm.name);
          else state.hide.add(arm.name);
          state.hideIsChosen = true;
          changed(() => {
            showLegends();
            showCurves();
            showRun();
          });
        });
        legend.append(element('label', { title: arm.label ?? '' }, box, sample(styleOf(arm.name)), arm.name));
      }
    }
  }

  function showLegends() {
    for (const box of document.querySelectorAll('[data-arm]')) box.checked = !state.hide.has(box.dataset.arm);
  }

  // ---- tables that sort ----

  const TABLES = ['curves', 'arms'].filter((name) => $(`${name}-table`));

  function showTable(name) {
    const table = $(`${name}-table`);
    const filter = $(`${name}-noise`);
    const there = new Set([...table.tBodies[0].rows].map((row) => row.dataset.noise));
    const noises = STUDY.noises.filter((noise) => there.has(noise.name));
    const options = [option('', 'all'), ...noises.map((noise) => option(noise.name, noise.label))];
    fill(filter, options, state[`${name}_noise`]);
    if (filter.selectedIndex < 0) filter.value = '';
    const headers = [...table.tHead.rows[0].cells];
    const column = headers.findIndex((header) => header.dataset.column === state[`${name}_sort`]);
    const falling = state[`${name}_order`] === 'descending';
    headers.forEach((header, i) => {
      if (i === column) header.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
      else header.removeAttribute('aria-sort');
    });
    const valueOf = (row) => (column < 0 ? row.dataset.position : row.cells[column].dataset.value);
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [a, b] = [valueOf(one), valueOf(other)];
      if ((a === '') !== (b === '')) return a === '' ? 1 : -1; // what is missing comes last, whichever the order
      const difference = Number.isNaN(a - b) ? a.localeCompare(b) : a - b;
      return difference ? (falling ? -difference : difference) : one.dataset.position - other.dataset.position;
    });
    for (const row of rows) row.hidden = filter.value !== '' && row.dataset.noise !== filter.value;
    table.tBodies[0].append(...rows);
  }

  function startTable(name) {
    $(`${name}-noise`).addEventListener('change', () => {
      state[`${name}_noise`] = $(`${name}-noise`).value;
      changed(() => showTable(name));
    });
    for (const header of $(`${name}-table`).tHead.rows[0].cells) {
      header.querySelector('button').addEventListener('click', () => {
        const again = state[`${name}_sort`] === header.dataset.column;
        state[`${name}_order`] = again && state[`${name}_order`] === 'descending' ? 'ascending' : 'descending';
        state[`${name}_sort`] = header.dataset.column;
        changed(() => showTable(name));
      });
    }
  }

  // ---- one run, step by step ----

  function showRun() {
    if (!$('run')) return;
    fill($('run'), STUDY.runs.map(({ label }, i) => option(String(i), label)), state.run === '' ? '0' : state.run);
    if ($('run').selectedIndex < 0) $('run').value = '0';
    const run = STUDY.runs[Number($('run').value)];
    const name = firstKnown(state.run_arm, run.arms.map((arm) => arm.name));
    fill($('run-arm'), run.arms.map((arm) => option(arm.name, arm.name)), name);
    const arm = run.arms.find((other) => other.name === name);

    charts($('run-charts'), ['gold', 'proxy'].map((quantity) => ({
      title: `${capital(quantity)} of every arm`,
      description: 'Points are single steps, lines their moving averages, large points the trained policies.',
      x: '√KL',
      series: visible(run.arms).flatMap((one) => {
        const style = styleOf(one.name);
        const [kl, values] = [smooth(one.kl), smooth(one[quantity])];
        const { final } = one;
        const end = final && !missing(final.kl) && !missing(final[quantity]);
        return [
          { style, kind: 'points', points: one.kl.map((at, i) => [root(at), one[quantity][i]]) },
          { style, kind: 'thick', points: kl.map((at, i) => [root(at), values[i]]) },
          ...(end ? [{
            style,
            kind: 'end',
            points: [[root(final.kl), final[quantity], `${one.name}, on held-out prompts: ${signed(final[quantity])}`]],
            band: quantity === 'gold' && final.interval ? [[root(final.kl), ...final.interval]] : [],
          }] : []),
        ];
      }),
    })));

    const marks = arm.alarms.map(({ step, score }) => ({ x: step, tip: `alarm at step ${step}, score ${number(score)}` }));
    const panels = [
      ['gold', 'Gold'], ['proxy', 'Proxy'], ['kl', 'KL, nats'], ['gap', 'Gap: nominal − worst case'],
      ['disagreement', 'Disagreement of the heads'], ['routing_std', 'Routing std'],
    ].filter(([key]) => arm[key].some((value) => value)); // a single head has no gap, point heads no std
    const plain = { style: styleOf(arm.name), solid: true };
    const over = (values) => values.map((value, i) => [arm.step[i], value]);
    charts($('step-charts'), [
      ...(arm.heads.length ? [{
        title: arm.heads.length === 1 ? 'Reward of its head' : `Rewards of its ${arm.heads.length} heads`,
        series: arm.heads.map((head) => ({ ...plain, kind: arm.heads.length === 1 ? 'thick' : 'thin', points: over(head) })),
      }] : []),
      ...panels.map(([key, title]) => ({ title, series: [{ ...plain, kind: 'thick', points: over(arm[key]) }] })),
    ].map((spec) => ({ ...spec, description: `Of arm ${arm.name}, ${run.label}.`, x: 'PPO step', marks })));
    const alarm = `${arm.name}: the alarm, which does not see gold,`;
    $('run-alarms').textContent = marks.length
      ? `${alarm} first fired at step ${marks[0].x} (▾ in the charts: ${marks.length} steps).`
      : `${alarm} did not fire.`;
  }

  function startRun() {
    if (!$('run')) return;
    for (const [id, key] of [['run', 'run'], ['run-arm', 'run_arm']]) {
      $(id).addEventListener('change', () => {
        state[key] = $(id).value;
        changed(showRun);
      });
    }
  }

  // ---- start ----

  function show() {
    readState();
    if (POOL) showExplore();
    showLegends();
    showCurves();
    TABLES.forEach(showTable);
    showRun();
  }

  readState();
  if (POOL) startExplore();
  startLegends();
  TABLES.forEach(startTable);
  startRun();
  show();
  window.addEventListener('hashchange', show);
})();
