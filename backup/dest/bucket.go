package dest

import (
	"context"
	"errors"
)

func openBucket(context.Context, string) (Destination, error) {
	return nil, errors.New("destination: want a folder")
}
