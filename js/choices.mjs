// The choices above a chart, and the curves of a run that they give: which quantity, how smooth,
// logarithmic or not.
import { element, formatCount, setText } from './elements.mjs'
import { smooth } from './series.mjs'

export const COLOURS = ['#4c8dff', '#e8832a', '#2fae70', '#e0557a', '#9a6cf0', '#17a6b8', '#bf9a1f', '#c95fc9']
const WINDOWS = [1, 3, 10, 30, 100, 300, 1000, 3000]

const QUANTITIES = {
  loss: (run) => run.columns.loss,
  learning_rate: (run) => run.columns.learning_rate,
  grad_norm: (run) => run.columns.grad_norm,
  score: (run) => run.score.value
}

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

  // Until someone moves the slider: about a sixth of the run.
  fit(numSteps) {
    if (!this.#isChosen) {
      const larger = WINDOWS.findIndex((window) => window > numSteps / 6)
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
