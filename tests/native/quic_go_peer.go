// A peer of the mesh's transport over quic-go: an implementation of QUIC that shares no code with ours. Debian's
// package, without modules: GO111MODULE=off GOPATH=/usr/share/gocode go build quic_go_peer.go
//
//	quic_go_peer serve                       prints its port; echoes one stream
//	quic_go_peer dial HOST:PORT MEGABYTES    sends and checks as many; prints a line
package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strconv"
	"time"

	quic "github.com/lucas-clemente/quic-go"
)

const rpc = 2 // a stream's first byte

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func identity() *tls.Config {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	check(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	check(err)
	return &tls.Config{
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: private}},
		NextProtos:         []string{"mesh-llm/1"},
		InsecureSkipVerify: true, // the key is the name, and any will do here
		ClientAuth:         tls.RequireAnyClientCert,
	}
}

func serve() {
	listener, err := quic.ListenAddr("127.0.0.1:0", identity(), nil)
	check(err)
	fmt.Println(listener.Addr().(*net.UDPAddr).Port)
	connection, err := listener.Accept(context.Background())
	check(err)
	stream, err := connection.AcceptStream(context.Background())
	check(err)
	kind := make([]byte, 1)
	_, err = io.ReadFull(stream, kind)
	check(err)
	if kind[0] != rpc {
		check(fmt.Errorf("a stream of kind %d", kind[0]))
	}
	_, err = io.Copy(stream, stream)
	check(err)
	check(stream.Close())
	<-connection.Context().Done()
}

func dial(address string, megabytes int) {
	connection, err := quic.DialAddr(address, identity(), nil)
	check(err)
	stream, err := connection.OpenStreamSync(context.Background())
	check(err)
	block := make([]byte, 1000000)
	_, err = rand.Read(block)
	check(err)
	go func() {
		_, err := stream.Write([]byte{rpc})
		for i := 0; i < megabytes && err == nil; i++ {
			_, err = stream.Write(block)
		}
		check(err)
		check(stream.Close())
	}()
	hash := sha256.New()
	n, err := io.Copy(hash, stream)
	check(err)
	expected := sha256.New()
	for i := 0; i < megabytes; i++ {
		expected.Write(block)
	}
	if !bytes.Equal(hash.Sum(nil), expected.Sum(nil)) {
		check(fmt.Errorf("%d bytes came back, and not those that were sent", n))
	}
	fmt.Println("all came back")
	check(connection.CloseWithError(0, "done"))
}

func main() {
	if os.Args[1] == "serve" {
		serve()
	} else {
		megabytes, err := strconv.Atoi(os.Args[3])
		check(err)
		dial(os.Args[2], megabytes)
	}
}
