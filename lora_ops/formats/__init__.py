"""The only readers and writers of other libraries' layouts. Below nn in the import order: it uses quant alone."""
