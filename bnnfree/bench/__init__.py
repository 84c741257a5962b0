"""Speed of the engine beside runtimes that run the same network in the same minutes; tools/bench.py prints it.

rounds (interleaved timing), machine, peak (what the processor's popcount could do), kernels (single ops of usual
shapes), costs (float operations of a packed model), peers and openvino_graph (the same packed model in ONNX Runtime
and OpenVINO). Peers are optional packages. training (time of a step), reading (images a second) and process_memory
measure trainings, and need torch.
"""
