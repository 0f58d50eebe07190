"""The runs of this process: admission, execution, recording, and one end for each."""
