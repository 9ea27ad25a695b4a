'use strict';
// Filters and orders the answers that stand in the page. The choice is kept in the address, after the #, so that a
// view can be bookmarked, sent, and linked to from the tables. Without a script all answers are shown.
(() => {
  const form = document.getElementById('controls');
  const list = document.getElementById('cards');
  const shown = document.getElementById('shown');
  const cards = Array.from(list.children);
  const fields = ['outcome', 'kind', 'camera', 'q', 'sort'];
  const number = (name) => (card) => Number(card.dataset[name]);
  const orders = {
    failures: [number('order'), 1],
    unsure: [number('confidence'), 1],
    sure: [number('confidence'), -1],
    time: [number('time'), 1],
    slow: [number('seconds'), -1],
    question: [(card) => card.querySelector('h3').textContent.toLowerCase(), 1],
  };
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));

  function wanted() {
    const asked = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(fields.map((name) => [name, asked.get(name) || '']));
  }

  function apply() {
    const choice = wanted();
    for (const name of fields) {
      const field = form.elements[name];
      if (field !== document.activeElement || field.tagName === 'SELECT') field.value = choice[name];
      if (field.tagName === 'SELECT' && field.selectedIndex < 0) field.selectedIndex = 0;
    }
    const words = choice.q.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const fits =
        ['outcome', 'kind', 'camera'].every((name) => !choice[name] || card.dataset[name] === choice[name]) &&
        words.every((word) => texts.get(card).includes(word));
      card.hidden = !fits;
      count += fits;
    }
    const [value, sign] = orders[choice.sort] || orders.failures;
    const ordered = cards.map((card) => [value(card), Number(card.dataset.order), card]);
    ordered.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1]));
    list.append(...ordered.map((entry) => entry[2]));
    shown.textContent = `${count} of ${cards.length} answers`;
  }

  function keep() {
    const chosen = new URLSearchParams();
    for (const name of fields) if (form.elements[name].value) chosen.set(name, form.elements[name].value);
    history.replaceState(null, '', `#${chosen}`);
    apply();
  }

  form.addEventListener('input', keep);
  form.addEventListener('submit', (event) => event.preventDefault());
  form.addEventListener('reset', () => {
    history.replaceState(null, '', '#');
    apply();
  });
  addEventListener('hashchange', () => {
    if (!location.hash.includes('=')) return; // a jump to a part of the page
    apply();
    document.getElementById('answers').scrollIntoView();
  });
  form.hidden = false;
  apply();
})();
