"""What the benches beside this folder run, by subject; what begins with ``cpu_``, and
``adamw_cpu``, is of ``cpu.py``, most of the rest of ``cuda.py``.

================  ================================================================================
``cpu_timing``    calls side by side on a CPU, and what its memory can do
``cpu_report``    rows, goals, and the table of them
``cpu_codes``     quantize and dequantize
``cpu_convert``   a checkpoint into 4 bits, against load and save
``cpu_products``  products as layers do them, of one row to 512
``cpu_models``    the model of the next two, in every format
``cpu_training``  a QLoRA step, and its memory
``cpu_decode``    greedy decoding
``timing``        calls side by side: events, graphs, buffers that rotate, medians
``tables``        how figures are shown
``memory``        what a process took of memory
``scripts``       scripts of transformers, PEFT and TRL: what ``huggingface.py`` runs
``report``        the card, rows, goals, and the table of them
``weights``       the matrices that are measured, in 16 bits, in ours, in bitsandbytes' format
``codes``         quantize and dequantize
``products``      products of a few and of many rows, and with the transposed weight
``training``      a QLoRA linear forward and backward, and what its LoRA side costs
``optimizers``    AdamW
``paging``        AdamW with paged state, and what its parts cost
``decode``        one token through the linear layers of a model of 8 billion parameters
``step``          a training step of such a model, against transformers + PEFT + bitsandbytes
``routes``        from how many rows on another kernel is the faster one
================  ================================================================================
"""
