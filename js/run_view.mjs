// One run: what it does, its curves, its sample pictures and its buttons. The node and the sidebar
// show the same.
import { tell } from './buttons.js'
import { Chart } from './chart.mjs'
import { Choices } from './choices.mjs'
import {
  button,
  element,
  fill,
  formatBytes,
  formatCount,
  formatDuration,
  formatNumber,
  setText
} from './elements.mjs'
import { translate } from './messages.js'
import { command, follow, isLive } from './run_data.mjs'
import { Samples } from './samples.mjs'

const RECENT_STEPS = 20

export class RunView {
  #texts
  #unfollow = null
  #run = null
  id = null

  constructor(texts) {
    this.#texts = texts
    this.chart = new Chart()
    this.choices = new Choices(texts, () => this.#drawChart())
    this.samples = new Samples(texts)
    this.state = element('span', { className: 'atelier-state' })
    this.steps = element('span', { className: 'atelier-steps' })
    this.bar = element('i')
    this.numbers = element('div', { className: 'atelier-numbers', ariaLive: 'off' })
    this.notice = element('div', { className: 'atelier-notice', hidden: true })
    this.buttons = element('div', { className: 'atelier-buttons' })
    this.empty = element('div', { className: 'atelier-empty', textContent: texts.empty })
    this.body = element(
      'div',
      { className: 'atelier-body', hidden: true },
      element('div', { className: 'atelier-head' }, this.state, this.steps),
      element('div', { className: 'atelier-progress' }, this.bar),
      this.numbers,
      this.notice,
      this.choices.element,
      this.chart.element,
      this.samples.element,
      this.buttons
    )
    this.element = element('div', { className: 'atelier-run' }, this.empty, this.body)
    this.element.addEventListener('pointerdown', (event) => {
      if (event.button === 0 && event.target.closest('button, select, input, label, canvas'))
        event.stopPropagation() // else the canvas drags the node
    })
  }

  show(id) {
    if (id === this.id) return
    this.#unfollow?.()
    this.id = id
    this.#run = null
    this.body.hidden = true
    this.empty.hidden = false
    this.#unfollow = id ? follow(id, (run) => this.#update(run)) : null
  }

  destroy() {
    this.show(null)
    this.chart.destroy()
  }

  #update(run) {
    this.#run = run
    const isKnown = Boolean(run.details) && !run.isMissing
    this.body.hidden = !isKnown
    this.empty.hidden = isKnown
    if (!isKnown) return
    this.#updateTexts(run)
    this.#updateButtons(run.details)
    this.samples.show(run.details.samples, run.preview)
    this.#drawChart()
  }

  #drawChart() {
    if (!this.#run?.details) return
    this.choices.select.querySelector('[value=score]').hidden = !this.#run.score.step.length
    this.choices.fit(this.#run.numSteps ?? this.#run.lastStep)
    const options = { isLog: this.choices.isLog, stepText: this.#texts.atStep }
    this.chart.show(this.choices.curves(this.#run, this.#texts), options)
  }

  #updateTexts(run) {
    const { details, columns } = run
    const texts = this.#texts
    const step = run.lastStep || details.step
    const total = run.numSteps ?? details.num_steps
    setText(this.state, texts.states[details.state] ?? details.state)
    this.element.dataset.state = details.state
    setText(this.steps, [step, total].filter((count) => count !== null).map(formatCount).join(' / '))
    this.bar.style.width = total ? `${(100 * step) / total}%` : '0'
    const recent = columns.seconds.slice(-RECENT_STEPS).filter((value) => value !== null)
    const seconds = recent.length ? recent.reduce((a, b) => a + b) / recent.length : null
    const isTraining = details.state === 'training'
    const facts = [
      [texts.loss, formatNumber(run.last('loss') ?? details.loss)],
      seconds !== null && ['', fill(texts.secondsPerStep, formatNumber(Number(seconds.toPrecision(3))))],
      isTraining && run.secondsLeft !== null && ['', fill(texts.left, formatDuration(run.secondsLeft))],
      run.last('memory') !== null && ['VRAM', formatBytes(run.last('memory'))],
      run.last('ram') !== null && ['RAM', formatBytes(run.last('ram'))]
    ].filter(Boolean)
    while (this.numbers.children.length > facts.length) this.numbers.lastChild.remove()
    facts.forEach(([name, value], index) => {
      if (!this.numbers.children[index])
        this.numbers.append(element('span', {}, element('small'), element('b')))
      const [label, number] = this.numbers.children[index].children
      setText(label, name)
      label.hidden = !name
      setText(number, value)
    })
    const notice = details.error ? translate(details.error) : texts.notices[details.state] ?? ''
    setText(this.notice, notice)
    this.notice.hidden = !notice
  }

  // Deleting belongs to the list of the sidebar. A finished run has nothing to resume.
  #updateButtons({ can, state }) {
    const buttons = ['stop', 'pause', ...(state === 'finished' ? [] : ['resume']), 'save', 'sample']
    const wanted = buttons.filter((what) => can.includes(what))
    const signature = `${this.id} ${wanted} ${state}`
    if (this.buttons.dataset.for === signature) return
    this.buttons.dataset.for = signature
    this.buttons.hidden = !wanted.length
    const tips = { ...this.#texts.tips, ...(isLive(state) ? {} : { resume: this.#texts.tips.resumeEnded }) }
    this.buttons.replaceChildren(
      ...wanted.map((what) => {
        const made = button(this.#texts.commands[what], () => this.#press(what, made), tips[what])
        made.dataset.command = what
        return made
      })
    )
  }

  async #press(what, pressed) {
    pressed.disabled = true
    try {
      await command(this.id, what)
      tell('success', this.#texts.commands[what], this.#texts.asked[what])
    } catch (error) {
      tell('error', this.#texts.commands[what], translate(error.message))
    } finally {
      pressed.disabled = false
      this.#run?.refresh()
    }
  }
}
