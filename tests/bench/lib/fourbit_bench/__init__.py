"""What the benches beside this folder run, by subject; most of it is of ``cuda.py``.

==============  ==================================================================================
``timing``      calls side by side: events, graphs, buffers that rotate, medians
``tables``      how figures are shown
``memory``      what a process took of memory
``scripts``     scripts of transformers, PEFT and TRL: what ``huggingface.py`` runs
``report``      the card, rows, goals, and the table of them
``weights``     the matrices that are measured, in 16 bits, in ours, in bitsandbytes' format
``codes``       quantize and dequantize
``products``    products of a few and of many rows, and with the transposed weight
``training``    a QLoRA linear forward and backward, and what its LoRA side costs
``optimizers``  AdamW
``paging``      AdamW with paged state, and what its parts cost
``decode``      one token through the linear layers of a model of 8 billion parameters
``step``        a training step of such a model, against transformers + PEFT + bitsandbytes
``routes``      from how many rows on another kernel is the faster one
==============  ==================================================================================
"""
