"""What runs adapter-foundry: on one machine, in containers, on Kubernetes, in a cloud."""
