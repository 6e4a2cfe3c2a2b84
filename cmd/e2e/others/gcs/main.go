// Command gcs serves Google Cloud Storage's JSON API on loopback, from files, until it is
// killed. fake-gcs-server's own command cannot take any free port and say which.
//
//	gcs FOLDER     each folder in it is a bucket; prints its host and port
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/fsouza/fake-gcs-server/fakestorage"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: gcs FOLDER")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	address := l.Addr().String()
	s, err := fakestorage.NewServerWithOptions(fakestorage.Options{
		StorageRoot: os.Args[1], NoListener: true, ExternalURL: "http://" + address, PublicHost: address,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(address)
	log.Fatal(http.Serve(l, s.HTTPHandler()))
}
