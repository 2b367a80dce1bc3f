// What the page knows of a run: its details and its metrics, asked from the server and continued by
// events. A run is shared by all that show it, and forgotten with the last of them.
import { api } from '../../scripts/api.js'

const COLUMNS = ['step', 'loss', 'grad_norm', 'learning_rate', 'seconds', 'memory', 'ram']
const runs = new Map()

export const isLive = (state) => state === 'training' || state === 'paused'

export async function listRuns() {
  const answer = await api.fetchApi('/atelier/runs', { cache: 'no-store' })
  return answer.ok ? (await answer.json()).runs : []
}

// Asks the server to do `what` with a run. Raises an Error with the server's sentence.
export async function command(id, what) {
  const answer = await api.fetchApi(`/atelier/runs/${encodeURIComponent(id)}/${what}`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify({ client_id: api.clientId }) // a graph that is queued tells this page
  })
  const body = await answer.json().catch(() => ({ error: answer.statusText }))
  if (!answer.ok) throw new Error(body.error ?? answer.statusText)
  return body
}

class Run {
  details = null
  isMissing = false
  numSteps = null
  secondsLeft = null
  preview = null // the sample picture that is being drawn: {step, key, name, picture}
  columns = Object.fromEntries(COLUMNS.map((name) => [name, []]))
  eval_loss = { step: [], value: [] }
  score = { step: [], value: [] }
  listeners = new Set()
  #asking = null
  #again = false

  constructor(id) {
    this.id = id
  }

  get lastStep() {
    return this.columns.step.at(-1) ?? 0
  }

  last(name) {
    return this.columns[name].at(-1) ?? null
  }

  // Asks for the details and for the steps that are not here. Calls meanwhile ask once more after it.
  refresh() {
    this.#again = Boolean(this.#asking)
    this.#asking ??= this.#ask().finally(() => {
      this.#asking = null
      if (this.#again) this.refresh()
    })
    return this.#asking
  }

  async #ask() {
    const path = `/atelier/runs/${encodeURIComponent(this.id)}`
    const options = { cache: 'no-store' }
    const asked = api.fetchApi(`${path}/metrics?since=${this.lastStep}`, options)
    const details = await api.fetchApi(path, options)
    this.isMissing = details.status === 404
    if (details.ok) this.details = await details.json()
    this.preview = null // when something changed, it was that the picture is done
    this.#tell() // a long run's metrics take half a second more
    const metrics = await asked
    if (metrics.ok) this.#take(await metrics.json())
    this.#tell()
  }

  // Steps of an event. When some are missing before them, or nothing was asked for yet, all is.
  receive({ state, num_steps, seconds_left, metrics }) {
    this.secondsLeft = seconds_left
    this.preview = null
    const [first] = metrics.step
    if (!this.details || (first ?? 0) > this.lastStep + 1) return this.refresh()
    if (this.details.state !== state) this.refresh()
    this.#take({ num_steps, ...metrics })
    this.#tell()
  }

  receivePreview(preview) {
    this.preview = preview
    if (this.details) this.#tell()
  }

  // A run that was resumed from a checkpoint repeats steps: the new ones replace those. Validations
  // come whole, and not at all with an event.
  #take({ num_steps, eval_loss, score, ...columns }) {
    if (num_steps) this.numSteps = num_steps
    if (eval_loss) Object.assign(this, { eval_loss, score })
    const { step } = columns
    if (!step.length) return
    let kept = this.columns.step.length
    while (kept && this.columns.step[kept - 1] >= step[0]) kept--
    for (const name of COLUMNS) {
      const mine = this.columns[name]
      mine.length = kept
      const added = columns[name] ?? step.map(() => null)
      for (let index = 0; index < added.length; index++) mine.push(added[index])
    }
  }

  #tell() {
    for (const listener of this.listeners) listener(this)
  }
}

// Calls `listener` with the run now and at every change; the answer is what ends that.
export function follow(id, listener) {
  const run = runs.get(id) ?? new Run(id)
  runs.set(id, run)
  run.listeners.add(listener)
  if (run.details) queueMicrotask(() => listener(run))
  else run.refresh()
  return () => {
    run.listeners.delete(listener)
    if (!run.listeners.size && runs.get(id) === run) runs.delete(id)
  }
}

export const receive = (event) => runs.get(event.run)?.receive(event)
export const receivePreview = (event) => runs.get(event.run)?.receivePreview(event)

// After something happened to one run, or after a time in which events may have been lost.
export const refresh = (id) => (id ? runs.get(id)?.refresh() : runs.forEach((run) => run.refresh()))
