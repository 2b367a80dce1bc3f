// One run: what it does, its curves, its sample pictures and its buttons. The node and the sidebar
// show the same.
import { tell } from './buttons.js'
import { Chart } from './chart.mjs'
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
import { smooth } from './series.mjs'

export const COLOURS = ['#4c8dff', '#e8832a', '#2fae70', '#e0557a', '#9a6cf0', '#17a6b8', '#bf9a1f', '#c95fc9']
const WINDOWS = [1, 3, 10, 30, 100, 300, 1000, 3000]
const RECENT_STEPS = 20

const QUANTITIES = {
  loss: (run) => run.columns.loss,
  learning_rate: (run) => run.columns.learning_rate,
  grad_norm: (run) => run.columns.grad_norm,
  score: (run) => run.score.value
}

// The choices above a chart: which quantity, how smooth, logarithmic or not.
export class Choices {
  #isChosen = false

  constructor(texts, changed) {
    this.select = element('select', { ariaLabel: texts.quantity, title: texts.quantity, onchange: changed })
    for (const name of Object.keys(QUANTITIES))
      this.select.append(element('option', { value: name, textContent: texts[name] }))
    this.slider = element('input', {
      type: 'range',
      min: 0,
      max: WINDOWS.length - 1,
      value: 0,
      ariaLabel: texts.smoothing,
      title: texts.smoothing,
      oninput: () => {
        this.#isChosen = true
        changed()
      }
    })
    this.window = element('span')
    this.log = element('input', { type: 'checkbox', onchange: changed })
    this.element = element(
      'div',
      { className: 'atelier-choices' },
      this.select,
      element('label', { className: 'atelier-smoothing' }, texts.smooth, this.slider, this.window),
      element('label', { title: texts.logTip }, this.log, texts.log)
    )
  }

  get quantity() {
    return this.select.value
  }

  // The weight of the past in a moving average over about so many steps.
  get smoothing() {
    return 1 - 1 / WINDOWS[this.slider.value]
  }

  // Until someone moves the slider: about a twelfth of the run.
  fit(numSteps) {
    if (!this.#isChosen) {
      const larger = WINDOWS.findIndex((window) => window > numSteps / 12)
      this.slider.value = larger < 0 ? WINDOWS.length - 1 : Math.max(0, larger - 1)
    }
    setText(this.window, formatCount(WINDOWS[this.slider.value]))
  }

  get isLog() {
    return this.log.checked
  }

  // The smoothed curve of a run, or its points.
  curve(run, name, colour) {
    const values = QUANTITIES[this.quantity](run)
    if (this.quantity === 'score') return { name, colour, x: run.score.step, y: values, isPoints: true }
    const isNoisy = this.quantity !== 'learning_rate'
    return { name, colour, x: run.columns.step, y: isNoisy ? smooth(values, this.smoothing) : values }
  }

  // All curves of a run alone: raw ones behind, points of the validation in front.
  curves(run, texts) {
    const [colour, other] = COLOURS
    const name = texts[this.quantity]
    const main = this.curve(run, name, colour)
    if (this.quantity === 'score' || this.quantity === 'learning_rate') return [main]
    const raw = { name, colour, x: main.x, y: QUANTITIES[this.quantity](run), isFaint: true }
    const curves = this.smoothing ? [raw, { ...main, name: texts.smoothed }] : [main]
    if (this.quantity === 'loss' && run.eval_loss.step.length)
      curves.push({
        name: texts.eval_loss,
        colour: other,
        x: run.eval_loss.step,
        y: run.eval_loss.value,
        isPoints: true
      })
    return curves
  }
}

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

  // Deleting belongs to the list of the sidebar. A paused run offers only what it can do.
  #updateButtons({ can, state }) {
    const wanted = ['stop', 'pause', 'resume', 'save', 'sample'].filter((what) => can.includes(what))
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
