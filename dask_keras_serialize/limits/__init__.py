"""What a config may ask for. All that is checked before Keras builds anything, and as it builds."""
