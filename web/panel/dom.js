// Elements, made once and then changed in place: a button that is being used must not be replaced twice a second.

/** An element with properties and children; `on` holds event listeners, `data` and `aria` attributes. */
export function make(tag, { on = {}, data = {}, aria = {}, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  for (const [name, value] of Object.entries(data)) element.dataset[name] = value;
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Sets text only where it differs, so that a selection or a screen reader is not disturbed. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * Makes the children of `parent` follow `items`, in order.
 *
 * @param {Map} rows key → {element, update(item, context)} of what is there; owned by the caller.
 * @param {() => {element: Element, update: (item, context) => void}} create
 * @param context what `update` needs beside the item.
 */
export function follow(parent, rows, items, key, create, context) {
  const wanted = new Set(items.map(key));
  for (const [id, row] of rows) {
    if (!wanted.has(id)) {
      row.element.remove();
      rows.delete(id);
    }
  }
  items.forEach((item, index) => {
    const id = key(item);
    if (!rows.has(id)) rows.set(id, create());
    const row = rows.get(id);
    if (parent.children[index] !== row.element) parent.insertBefore(row.element, parent.children[index] ?? null);
    row.update(item, context);
  });
}
