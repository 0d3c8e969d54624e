"""transformers.

==================  ==============================================================================
``folders``         `fourbit.from_pretrained`: our folders, without transformers' loader
``config``          `NF4Config`: what ``quantization_config=`` takes
``quantizer``       what transformers calls while it loads, saves and dequantizes a model
``targets``         which weights of a model are quantized while they are read
``checkpoints``     which weights of a model are quantized in a folder
``rooms``           the places of such weights in a model, and how they are filled
``collecting``      what collects a checkpoint's tensors for one of the model's
``operations``      what makes that one of them
``models``          a loaded model: its config, its files, and dense again
``bitsandbytes``    the quantizer for a ``BitsAndBytesConfig``, after the takeover
``methods``         ``num_parameters()`` and ``save_pretrained()`` of models
``saving``          the latter, of models that fourbit itself has quantized
``expert_names``    where the weights of experts lie in checkpoints
``experts``         the forward of experts
``arrange``         where the tensors of one of our folders go in a model
``registration``    how transformers comes to know of all this
==================  ==============================================================================
"""
