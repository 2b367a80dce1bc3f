// Curves on a canvas: drawn at most once per frame, only while they can be seen, and with as many
// lines as the canvas has columns, however many points there are.
import { element, fill, formatCount, formatNumber, setText } from './elements.mjs'
import { logTicks, nearest, rangeOf, reduceToColumns, ticks } from './series.mjs'

const FONT = '10px Inter, system-ui, sans-serif'
const PAD = { top: 8, right: 10, bottom: 18, left: 8 }

export class Chart {
  #curves = []
  #options = { isLog: false, stepText: '(0)' }
  #isVisible = false
  #frame = 0
  #hovered = null // pixels from the left
  #scales = null
  #readout = element('div', { className: 'atelier-readout', hidden: true })
  #canvas = element('canvas', { className: 'atelier-canvas' })
  numDrawn = 0 // of frames; tests and measurements read it

  constructor() {
    this.element = element('div', { className: 'atelier-chart' }, this.#canvas, this.#readout)
    this.#canvas.onpointermove = (event) => this.#hover(event.offsetX)
    this.#canvas.onpointerleave = () => this.#hover(null)
    this.observers = [
      new ResizeObserver(() => this.#ask()),
      new IntersectionObserver((entries) => {
        this.#isVisible = entries.at(-1).isIntersecting
        this.#ask()
      }),
      new MutationObserver(() => this.#ask()) // the theme is a class and a style of the page
    ]
    this.observers[0].observe(this.element)
    this.observers[1].observe(this.element)
    for (const themed of [document.documentElement, document.body])
      this.observers[2].observe(themed, { attributeFilter: ['class', 'style'] })
  }

  // Each curve is {name, colour, x, y} and may be isFaint (behind the others, without its outliers),
  // or isPoints. The x are steps, ascending.
  show(curves, options) {
    this.#curves = curves
    this.#options = { ...this.#options, ...options }
    this.#canvas.ariaLabel = curves.map(({ name }) => name).join(', ')
    this.#ask()
  }

  destroy() {
    for (const observer of this.observers) observer.disconnect()
    cancelAnimationFrame(this.#frame)
  }

  #ask() {
    if (!this.#isVisible || this.#frame) return
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0
      this.#draw()
    })
  }

  #hover(place) {
    this.#hovered = place
    this.#ask()
  }

  #draw() {
    const canvas = this.#canvas
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    if (!width || !height) return
    // A node that is zoomed in is drawn with more pixels, so that it stays sharp.
    const zoom = Math.min(3, Math.max(1, canvas.getBoundingClientRect().width / width))
    const ratio = devicePixelRatio * zoom
    canvas.width = Math.round(width * ratio)
    canvas.height = Math.round(height * ratio)
    const context = canvas.getContext('2d')
    context.scale(ratio, ratio)
    context.font = FONT
    this.#scales = this.#measure(context, width, height)
    if (this.#scales) {
      const style = getComputedStyle(canvas)
      this.#drawGrid(context, style)
      context.save()
      const { left, right, top, bottom } = this.#scales
      context.beginPath()
      context.rect(left, top - 4, right - left + 4, bottom - top + 6)
      context.clip()
      for (const curve of this.#curves) this.#drawCurve(context, curve)
      context.restore()
    }
    this.#drawHovered(context)
    this.numDrawn++
  }

  #measure(context, width, height) {
    const { isLog } = this.#options
    const isUsable = (value) => !isLog || value > 0
    const ranges = this.#curves
      .map(({ y, isFaint }) => rangeOf(isLog ? y.filter(isUsable) : y, isFaint ? 0.98 : 1))
      .filter(Boolean)
    if (!ranges.length) return null
    const drawn = this.#curves.filter(({ x }) => x.length)
    const xLow = Math.min(...drawn.map(({ x }) => x[0]))
    const xHigh = Math.max(xLow + 1, ...drawn.map(({ x }) => x.at(-1)))
    let low = Math.min(...ranges.map(([value]) => value))
    let high = Math.max(...ranges.map(([, value]) => value))
    if (high - low < Math.abs(high) * 1e-6 || high === low) {
      const margin = Math.abs(high) * 0.1 || 1
      low -= margin
      high += margin
    }
    const toScale = isLog ? Math.log10 : (value) => value
    const [top, bottom] = [PAD.top, height - PAD.bottom]
    const marks = (isLog ? logTicks : ticks)(low, high, Math.max(2, Math.floor((bottom - top) / 28)))
    const labels = marks.map(formatNumber)
    const widest = Math.max(0, ...labels.map((label) => context.measureText(label).width))
    const [left, right] = [PAD.left + widest + 6, width - PAD.right]
    const toX = (step) => left + ((step - xLow) / (xHigh - xLow)) * (right - left)
    const toStep = (place) => xLow + ((place - left) / (right - left)) * (xHigh - xLow)
    const perUnit = (bottom - top) / (toScale(high) - toScale(low))
    const toY = (value) => bottom - (toScale(value) - toScale(low)) * perUnit
    return { left, right, top, bottom, xLow, xHigh, marks, labels, toX, toY, toStep, isUsable }
  }

  #drawGrid(context, style) {
    const { left, right, bottom, marks, labels, toX, toY, xLow, xHigh } = this.#scales
    context.strokeStyle = style.borderTopColor
    context.fillStyle = style.color
    const line = (...points) => {
      context.beginPath()
      for (const [x, y] of points) context.lineTo(Math.round(x) + 0.5, Math.round(y) + 0.5)
      context.stroke()
    }
    context.textAlign = 'right'
    context.textBaseline = 'middle'
    marks.forEach((value, index) => {
      line([left, toY(value)], [right, toY(value)])
      context.fillText(labels[index], left - 6, toY(value))
    })
    line([left, bottom], [right, bottom])
    context.textAlign = 'left'
    context.textBaseline = 'alphabetic'
    for (const step of ticks(xLow, xHigh, Math.max(2, Math.floor((right - left) / 70)))) {
      if (!Number.isInteger(step)) continue
      const label = formatCount(step)
      const { width } = context.measureText(label)
      line([toX(step), bottom], [toX(step), bottom + 3])
      context.fillText(label, Math.min(toX(step) - width / 2, right + PAD.right - width), bottom + 14)
    }
  }

  #drawCurve(context, { x, y, colour, isFaint, isPoints }) {
    const { toX, toY, isUsable, right, left } = this.#scales
    const columnsPerPixel = 2
    const points = reduceToColumns(x, y, (step) => toX(step) * columnsPerPixel)
    context.strokeStyle = context.fillStyle = colour
    context.globalAlpha = isFaint ? 0.3 : 1
    context.lineWidth = isFaint ? 1 : 1.75
    context.lineJoin = 'round'
    const dot = points.length === 1 || (isPoints && points.length < (right - left) / 4)
    context.beginPath()
    for (const [column, value] of points)
      if (isUsable(value)) context.lineTo(column / columnsPerPixel, toY(value))
    context.stroke()
    if (dot)
      for (const [column, value] of points) {
        context.beginPath()
        context.arc(column / columnsPerPixel, toY(value), 2.75, 0, 2 * Math.PI)
        context.fill()
      }
    context.globalAlpha = 1
  }

  #drawHovered(context) {
    const scales = this.#scales
    const isShown = scales && this.#hovered !== null
    this.#readout.hidden = !isShown
    if (!isShown) return
    const place = Math.min(Math.max(this.#hovered, scales.left), scales.right)
    const wanted = scales.toStep(place)
    const [all] = [...this.#curves].filter(({ x }) => x.length).sort((a, b) => b.x.length - a.x.length)
    const step = all.x[nearest(all.x, wanted)]
    const x = scales.toX(step)
    context.strokeStyle = getComputedStyle(this.#canvas).color
    context.lineWidth = 1
    context.globalAlpha = 0.6
    context.beginPath()
    context.moveTo(Math.round(x) + 0.5, scales.top)
    context.lineTo(Math.round(x) + 0.5, scales.bottom)
    context.stroke()
    context.globalAlpha = 1
    const rows = [element('div', { textContent: fill(this.#options.stepText, formatCount(step)) })]
    for (const curve of this.#curves) {
      const row = this.#readoutRow(curve, step, context)
      if (row) rows.push(row)
    }
    this.#readout.replaceChildren(...rows)
    const isLeft = x > (scales.left + scales.right) / 2
    this.#readout.style.left = isLeft ? `${scales.left + 4}px` : ''
    this.#readout.style.right = isLeft ? '' : `${PAD.right}px`
  }

  #readoutRow({ name, colour, x, y, isFaint, isPoints }, step, context) {
    if (!x.length || step > x.at(-1) || step < x[0]) return null
    const index = nearest(x, step)
    const value = y[index]
    if (value === null || !Number.isFinite(value)) return null
    const { toX, toY, isUsable } = this.#scales
    if (!isFaint && isUsable(value)) {
      context.fillStyle = colour
      context.beginPath()
      context.arc(toX(x[index]), toY(value), 3, 0, 2 * Math.PI)
      context.fill()
    }
    const swatch = element('i', { className: 'atelier-swatch' })
    swatch.style.background = colour
    swatch.style.opacity = isFaint ? 0.5 : 1
    const label = element('span', { className: 'atelier-readout-name' })
    setText(label, isPoints && x[index] !== step ? `${name} (${x[index]})` : name)
    return element('div', {}, swatch, label, element('b', { textContent: formatNumber(value) }))
  }
}
