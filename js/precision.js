import { app } from '../../scripts/app.js'

app.registerExtension({
  name: 'Atelier.Precision',
  // Nodes 2.0 (frontend 1.32) shows three decimals and, when a field is left, keeps what it shows:
  // a learning rate of 0.0001 became the smallest one allowed. Tell it how many decimals there are.
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith('Atelier')) return
    for (const { options } of node.widgets ?? [])
      if (options?.precision > 3) options.maxFractionDigits = options.precision
  }
})
