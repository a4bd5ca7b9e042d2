"""What all figures share: how they are made, styled, divided into panels and saved."""
