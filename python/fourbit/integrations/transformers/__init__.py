"""transformers.

==================  ==============================================================================
``folders``         `fourbit.from_pretrained`: our folders, without transformers' loader
``config``          `NF4Config`: what ``quantization_config=`` takes
``quantizer``       what transformers calls while it loads, saves and dequantizes a model
``operations``      one tensor on its way from a file into the model
``checkpoints``     which layers of a model are quantized in a folder
``counting``        ``num_parameters()`` of models
``expert_names``    where the weights of experts lie in checkpoints
``experts``         the forward of experts
``arrange``         where the tensors of one of our folders go in a model
``registration``    how transformers comes to know of all this
==================  ==============================================================================
"""
