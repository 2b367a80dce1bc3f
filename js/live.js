// The live view: on every Train LoRA node the run that it trains, and in the sidebar all runs.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { ownTexts } from './buttons.js'
import { isLive, listRuns, receive, receivePreview, refresh } from './run_data.mjs'
import { RunsTab } from './runs_tab.mjs'
import { RunView } from './run_view.mjs'

const OUR_NODE = 'AtelierTrainLoRA'
const PROPERTY = 'atelier_run'
const NODE_HEIGHT_PX = 370

let texts
let tab = null
let assigning = 0
const views = new Map() // node to its view

// The node that the server calls "12", or "12:5" for node 5 inside of the subgraph node 12.
function findNode(id) {
  const path = String(id ?? '').split(':')
  const last = path.pop()
  let graph = app.rootGraph ?? app.graph
  for (const part of path) graph = graph?.getNodeById(part)?.subgraph
  return graph?.getNodeById(last)
}

// Another workflow, too, may have a Train LoRA node of that number: the names must agree, where the
// node's own is known.
function nodeOfRun(id, run) {
  const node = findNode(id)
  if (!views.has(node)) return null
  const isLinked = node.inputs?.some(({ name, link }) => name === 'name' && link)
  const name = node.widgets.find((widget) => widget.name === 'name')?.value
  const isSame = isLinked || run.startsWith(`${name}-`) || node.properties[PROPERTY] === run
  return isSame ? node : null
}

function showRun(node, id) {
  views.get(node)?.show(id)
  node.properties[PROPERTY] = id // saved with the workflow
}

// Runs that are live belong to the nodes that train them; the others to those that remember them.
async function assignRuns() {
  assigning = 0
  const runs = await listRuns()
  const known = new Set(runs.map(({ id }) => id))
  for (const [node, view] of views)
    if (!view.id && known.has(node.properties[PROPERTY])) view.show(node.properties[PROPERTY])
  for (const { id, node: nodeId, state } of runs) {
    const node = isLive(state) && nodeOfRun(nodeId, id)
    if (node) showRun(node, id)
  }
}

function addView(node) {
  const view = new RunView(texts)
  views.set(node, view)
  const widget = node.addDOMWidget('live_view', 'atelier_live_view', view.element, {
    serialize: false, // in the prompt
    hideOnZoom: false,
    getMinHeight: () => NODE_HEIGHT_PX
  })
  widget.serialize = false // in the workflow
  const { onExecuted, onRemoved } = node
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments)
    if (output?.atelier_run) showRun(node, output.atelier_run[0])
  }
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments)
    view.destroy()
    views.delete(node)
  }
  assigning ||= setTimeout(assignRuns) // when all nodes of a workflow are there
}

function onEvent(detail) {
  const node = nodeOfRun(detail.node, detail.run)
  if (node && views.get(node).id !== detail.run) showRun(node, detail.run)
}

function catchUp() {
  refresh()
  tab?.refresh()
  assignRuns()
}

function addTab() {
  app.extensionManager.registerSidebarTab({
    id: 'atelier-runs',
    icon: 'pi pi-chart-line',
    title: texts.runs,
    tooltip: texts.runsTip,
    type: 'custom',
    render(place) {
      tab?.destroy()
      tab = new RunsTab(texts)
      place.replaceChildren(tab.element)
    },
    destroy() {
      tab?.destroy()
      tab = null
    }
  })
}

app.registerExtension({
  name: 'Atelier.Live',
  async setup() {
    const style = { rel: 'stylesheet', href: new URL('./live.css', import.meta.url).href }
    document.head.append(Object.assign(document.createElement('link'), style))
    texts = (await ownTexts()).live
    addTab()
    api.addEventListener('atelier.step', ({ detail }) => {
      onEvent(detail)
      receive(detail)
      tab?.receive(detail)
    })
    api.addEventListener('atelier.run', ({ detail }) => {
      onEvent(detail)
      refresh(detail.run)
      tab?.refresh()
    })
    api.addEventListener('atelier.preview', ({ detail }) => receivePreview(detail))
    api.addEventListener('reconnected', catchUp)
    document.addEventListener('visibilitychange', () => document.hidden || catchUp())
  },
  nodeCreated(node) {
    if (node.comfyClass === OUR_NODE) addView(node)
  }
})
