// Curves of several runs in one chart, with their names below it.
import { Chart } from './chart.mjs'
import { Choices, COLOURS } from './choices.mjs'
import { element } from './elements.mjs'
import { follow } from './run_data.mjs'

export class Comparison {
  #texts
  #runs = new Map() // id to {name, run, unfollow, colour}

  constructor(texts) {
    this.#texts = texts
    this.chart = new Chart()
    this.choices = new Choices(texts, () => this.#draw())
    this.legend = element('ul', { className: 'atelier-legend' })
    this.element = element(
      'section',
      { className: 'atelier-comparison', hidden: true, ariaLabel: texts.comparison },
      this.choices.element,
      this.chart.element,
      this.legend
    )
  }

  has(id) {
    return this.#runs.has(id)
  }

  // A run keeps its colour for as long as it is compared.
  add(id, name) {
    if (this.has(id)) return
    const taken = new Set([...this.#runs.values()].map(({ colour }) => colour))
    const colour = COLOURS.find((one) => !taken.has(one)) ?? COLOURS[0]
    const entry = { name, colour, run: null }
    this.#runs.set(id, entry)
    entry.unfollow = follow(id, (run) => {
      entry.run = run
      this.#draw()
    })
    this.#draw()
  }

  remove(id) {
    this.#runs.get(id)?.unfollow()
    this.#runs.delete(id)
    this.#draw()
  }

  destroy() {
    for (const { unfollow } of this.#runs.values()) unfollow()
    this.#runs.clear()
    this.chart.destroy()
  }

  #draw() {
    const entries = [...this.#runs.values()]
    this.element.hidden = !entries.length
    this.legend.replaceChildren(
      ...entries.map(({ name, colour }) => {
        const swatch = element('i', { className: 'atelier-swatch' })
        swatch.style.background = colour
        return element('li', { title: name }, swatch, element('span', { textContent: name }))
      })
    )
    const known = entries.filter(({ run }) => run?.details)
    this.choices.fit(Math.max(1, ...known.map(({ run }) => run.lastStep)))
    const curves = known.map(({ run, name, colour }) => this.choices.curve(run, name, colour))
    this.chart.show(curves, { isLog: this.choices.isLog, stepText: this.#texts.atStep })
  }
}
