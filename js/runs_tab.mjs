// The sidebar's list of all runs of this machine, the comparison above it, and one run opened.
import { element, formatCount, formatNumber, setText, viewURL } from './elements.mjs'
import { Comparison } from './compare.mjs'
import { RunDetails } from './run_details.mjs'
import { listRuns } from './run_data.mjs'

export class RunsTab {
  #texts
  #rows = new Map() // id to the elements of its row
  #opened = null

  constructor(texts) {
    this.#texts = texts
    this.comparison = new Comparison(texts)
    this.list = element('ul', { className: 'atelier-list' })
    this.nothing = element('p', { className: 'atelier-empty', textContent: texts.noRuns, hidden: true })
    const refresh = element(
      'button',
      { type: 'button', title: texts.refresh, ariaLabel: texts.refresh, onclick: () => this.refresh() },
      element('i', { className: 'pi pi-refresh' })
    )
    this.page = element(
      'div',
      { className: 'atelier-page' },
      element('header', {}, element('h2', { textContent: texts.runs }), refresh),
      this.comparison.element,
      this.nothing,
      this.list
    )
    this.element = element('div', { className: 'atelier-tab' }, this.page)
    this.refresh()
  }

  destroy() {
    this.comparison.destroy()
    this.#opened?.destroy()
    this.element.remove()
  }

  async refresh() {
    const runs = await listRuns()
    const ids = new Set(runs.map(({ id }) => id))
    for (const [id, { row }] of this.#rows)
      if (!ids.has(id)) {
        row.remove()
        this.#rows.delete(id)
        this.comparison.remove(id)
      }
    runs.forEach((run, index) => {
      const entry = this.#rows.get(run.id) ?? this.#addRow(run)
      this.#updateRow(entry, run)
      if (this.list.children[index] !== entry.row)
        this.list.insertBefore(entry.row, this.list.children[index] ?? null)
    })
    this.nothing.hidden = runs.length > 0
  }

  // The step that an event told, without asking for the whole list.
  receive({ run, step, num_steps, metrics }) {
    const entry = this.#rows.get(run)
    if (!entry) return this.refresh()
    const loss = metrics.loss.at(-1) ?? entry.run.loss
    this.#updateRow(entry, { ...entry.run, step, num_steps, loss })
  }

  open(id) {
    this.#opened?.destroy()
    this.#opened = new RunDetails(this.#texts, id, () => this.#close())
    this.page.hidden = true
    this.element.append(this.#opened.element)
  }

  #close() {
    this.#opened?.destroy()
    this.#opened = null
    this.page.hidden = false
    this.refresh()
  }

  #addRow({ id, name }) {
    const texts = this.#texts
    const compare = element('input', { type: 'checkbox', title: texts.compare, ariaLabel: `${texts.compare}: ${name}` })
    compare.onchange = () =>
      compare.checked ? this.comparison.add(id, id) : this.comparison.remove(id)
    const picture = element('img', { alt: '', loading: 'lazy', draggable: false, hidden: true })
    const state = element('span', { className: 'atelier-state' })
    const facts = element('span', { className: 'atelier-facts' })
    const time = element('time')
    const open = element(
      'button',
      { type: 'button', className: 'atelier-open', onclick: () => this.open(id) },
      element('span', { className: 'atelier-thumbnail' }, picture),
      element(
        'span',
        { className: 'atelier-title' },
        element('b', { textContent: name, title: id }),
        element('span', {}, state, time),
        facts
      )
    )
    const row = element('li', {}, compare, open)
    row.dataset.run = id
    const entry = { row, picture, state, facts, time }
    this.#rows.set(id, entry)
    return entry
  }

  #updateRow(entry, run) {
    const texts = this.#texts
    entry.run = run
    entry.row.dataset.state = run.state
    setText(entry.state, texts.states[run.state] ?? run.state)
    const steps = [run.step, run.num_steps].filter((count) => count !== null).map(formatCount).join(' / ')
    const loss = run.loss === null ? '' : ` · ${texts.loss} ${formatNumber(run.loss)}`
    setText(entry.facts, `${texts.steps} ${steps}${loss}`)
    if (run.updated) {
      const time = new Date(run.updated * 1000)
      const isToday = time.toDateString() === new Date().toDateString()
      const shown = isToday ? time.toLocaleTimeString([], { timeStyle: 'short' }) : time.toLocaleDateString()
      setText(entry.time, shown)
      entry.time.title = time.toLocaleString()
    }
    if (!run.thumbnail) return
    const address = viewURL(run.thumbnail, { preview: 'webp;60' })
    if (entry.address === address) return
    entry.address = address
    entry.picture.src = address
    entry.picture.hidden = false
  }
}
