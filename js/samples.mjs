// The sample pictures of a run: a row for each prompt, step 0 first, and one picture enlarged.
import { element, fill, viewURL } from './elements.mjs'

function enlarge(samples, start, texts) {
  const picture = element('img')
  const caption = element('figcaption')
  let index = start
  const show = (next) => {
    index = (next + samples.length) % samples.length
    const { name, prompt, step } = samples[index]
    picture.src = viewURL(samples[index])
    picture.alt = prompt || name
    caption.replaceChildren(
      element('b', { textContent: fill(texts.atStep, step) }),
      element('span', { textContent: name }),
      element('span', { textContent: prompt === name ? '' : prompt })
    )
  }
  const turn = (label, by, sign) =>
    element('button', { type: 'button', ariaLabel: label, textContent: sign, onclick: () => show(index + by) })
  const close = element('button', {
    type: 'button',
    className: 'atelier-close',
    ariaLabel: texts.close,
    textContent: '×',
    onclick: () => dialog.close()
  })
  const dialog = element(
    'dialog',
    { className: 'atelier-enlarged' },
    turn(texts.previous, -1, '‹'),
    element('figure', {}, picture, caption),
    turn(texts.next, 1, '›'),
    close
  )
  dialog.onkeydown = (event) => {
    event.stopPropagation() // the canvas moves nodes with these keys
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key]
    if (by) show(index + by)
  }
  dialog.onclick = ({ target }) => target.closest('button, img') || dialog.close()
  dialog.onclose = () => dialog.remove()
  document.body.append(dialog)
  show(start)
  dialog.showModal()
}

export class Samples {
  #texts
  #shown = ''
  #coming = element('img', { alt: '', draggable: false }) // a picture while it is denoised

  constructor(texts) {
    this.#texts = texts
    this.element = element('div', { className: 'atelier-samples', hidden: true })
    // The newest are seen first. Before the page lays them out there is nothing to scroll.
    new ResizeObserver(() => this.#scrollToNewest()).observe(this.element)
  }

  // `preview` is {step, key, name, picture}, or null.
  show(samples, preview) {
    if (preview) this.#coming.src = preview.picture
    const all = JSON.stringify([samples, preview?.key, preview?.step])
    if (all === this.#shown) return
    this.#shown = all
    this.element.hidden = !samples.length && !preview
    const keys = new Set([...samples, ...(preview ? [preview] : [])].map(({ key }) => key))
    const rows = [...keys].map((key) => {
      const thumbs = samples
        .map((sample, index) => sample.key === key && this.#thumb(samples, index))
        .filter(Boolean)
      if (preview?.key === key) thumbs.push(this.#comingThumb(preview))
      return element('div', { className: 'atelier-strip' }, ...thumbs)
    })
    this.element.replaceChildren(...rows)
    this.#scrollToNewest()
  }

  #scrollToNewest() {
    for (const row of this.element.children) row.scrollLeft = row.scrollWidth
  }

  #thumb(samples, index) {
    const sample = samples[index]
    const step = fill(this.#texts.atStep, sample.step)
    const picture = element('img', {
      src: viewURL(sample, { preview: 'webp;80' }),
      alt: sample.prompt || sample.name,
      loading: 'lazy',
      draggable: false
    })
    picture.style.aspectRatio = `${sample.width} / ${sample.height}`
    const properties = {
      type: 'button',
      className: 'atelier-sample',
      title: `${sample.name}\n${step}`,
      onclick: () => enlarge(samples, index, this.#texts)
    }
    return element('button', properties, picture, element('span', { textContent: sample.step }))
  }

  #comingThumb({ name, step }) {
    const label = element('span', { textContent: `${step} …` })
    return element('div', { className: 'atelier-sample atelier-coming', title: name }, this.#coming, label)
  }
}
