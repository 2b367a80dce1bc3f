// One run opened in the sidebar: the live view, its files, and what can be done with it.
import { app } from '../../scripts/app.js'
import { tell } from './buttons.js'
import { button, element, fill, formatBytes, setText, viewURL } from './elements.mjs'
import { translate } from './messages.js'
import { command, follow } from './run_data.mjs'
import { RunView } from './run_view.mjs'

const OUR_NODE = 'AtelierTrainLoRA'

// A node in the middle of what is seen, with the settings that it has of its own; inputs that were
// linked have no value to copy.
function addNode(settings) {
  const node = LiteGraph.createNode(OUR_NODE)
  const [left, top, width, height] = app.canvas.visible_area
  node.pos = [left + (width - node.size[0]) / 2, top + (height - node.size[1]) / 2]
  app.canvas.graph.add(node)
  for (const widget of node.widgets)
    if (Object.hasOwn(settings, widget.name)) widget.value = settings[widget.name]
  app.canvas.selectNode(node)
  node.setDirtyCanvas(true, true)
}

export class RunDetails {
  #texts
  #shown = ''

  constructor(texts, id, close) {
    this.#texts = texts
    this.id = id
    this.close = close
    this.view = new RunView(texts)
    this.heading = element('h2', { textContent: id, title: id })
    this.actions = element('div', { className: 'atelier-buttons' })
    this.files = element('section', { className: 'atelier-files' })
    const back = element(
      'button',
      { type: 'button', title: texts.back, ariaLabel: texts.back, onclick: close },
      element('i', { className: 'pi pi-arrow-left' })
    )
    this.element = element(
      'div',
      { className: 'atelier-page atelier-opened' },
      element('header', {}, back, this.heading),
      this.view.element,
      this.actions,
      this.files
    )
    this.view.show(id)
    this.unfollow = follow(id, (run) => this.#update(run))
  }

  destroy() {
    this.unfollow()
    this.view.destroy()
    this.element.remove()
  }

  #update({ details, isMissing }) {
    if (isMissing) return this.close()
    if (!details) return
    const { settings, can, files, path, lora } = details
    const shown = JSON.stringify([settings, can, files, path, lora])
    if (shown === this.#shown) return // steps change nothing here
    this.#shown = shown
    const texts = this.#texts
    const copy = button(texts.copySettings, () => this.#copy(settings), texts.copySettingsTip)
    copy.disabled = !settings
    const remove = button(texts.remove, () => this.#remove(remove), texts.removeTip)
    remove.className = 'atelier-danger'
    this.actions.replaceChildren(copy, ...(can.includes('delete') ? [remove] : []))
    this.files.replaceChildren(...this.#fileRows(details))
  }

  #fileRows({ path, folder, lora, files }) {
    const texts = this.#texts
    const copyPath = button(texts.copyPath, async () => {
      await navigator.clipboard.writeText(path)
      tell('success', texts.copyPath, path)
    })
    const link = (name, view, detail) =>
      element(
        'li',
        {},
        view
          ? element('a', { textContent: name, title: name, href: viewURL(view), download: view.filename })
          : element('span', { textContent: name, title: name }),
        element('small', { textContent: detail })
      )
    const isSample = (name) => name.startsWith('samples/') && name.endsWith('.png')
    const sampleView = (name) => ({
      filename: name.slice('samples/'.length),
      subfolder: `${folder}/samples`,
      type: 'output'
    })
    const total = files.reduce((sum, { bytes }) => sum + bytes, 0)
    const rows = files.map(({ path: name, bytes }) =>
      link(name, isSample(name) && sampleView(name), formatBytes(bytes))
    )
    const summary = element('summary')
    setText(summary, fill(texts.files, files.length, formatBytes(total)))
    return [
      ...(lora ? [element('h3', { textContent: texts.lora }), element('ul', {}, link(lora.filename, lora, ''))] : []),
      element('h3', { textContent: texts.folder }),
      element('div', { className: 'atelier-path' }, element('code', { textContent: path, title: path }), copyPath),
      element('details', {}, summary, element('ul', {}, ...rows))
    ]
  }

  #copy(settings) {
    addNode(settings)
    tell('success', this.#texts.copySettings, this.#texts.copied)
  }

  async #remove(pressed) {
    const { remove, removeQuestion, freed } = this.#texts
    const question = { title: remove, message: fill(removeQuestion, this.id), type: 'delete' }
    if (!(await app.extensionManager.dialog.confirm(question))) return
    pressed.disabled = true
    try {
      const answer = await command(this.id, 'delete')
      tell('success', remove, fill(freed, formatBytes(answer.freed)))
      this.close()
    } catch (error) {
      tell('error', remove, translate(error.message))
      pressed.disabled = false
    }
  }
}
